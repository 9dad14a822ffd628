"""Every error this backend raises on purpose, each with a message that its reader can act on.

One tree, so that a caller catches as broadly as it means to. ``code`` is the stable word that appears in job
lists, HTTP answers and metrics; ``retryable`` tells the queue whether trying again can succeed; ``http_status``
is what the web room answers when the error ends a request.
"""

from __future__ import annotations

from typing import ClassVar

LICENCE_URL = "https://github.com/FraunhoferMEVIS/MedicalMultitaskModeling/blob/main/license.md"


class BackendError(Exception):
    """Base of all deliberate errors.

    Parameters
    ----------
    message
        What went wrong, with the value that was wrong in it.
    hint
        What the reader can do about it; empty if there is nothing.
    """

    code: ClassVar[str] = "backend_error"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    ordinary: ClassVar[bool] = False
    """Whether a job that is put off with it is no failure: nothing is wrong, nobody need know."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def as_dict(self) -> dict[str, str | bool]:
        """The error as JSON: ``code``, ``message``, ``hint``, ``retryable``."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "retryable": self.retryable}


# --- settings and licence ---------------------------------------------------------------------------------------


class SettingsError(BackendError):
    """A setting has a value that cannot be used."""

    code = "bad_setting"


class LicenceNotAccepted(BackendError):
    """``medicalmultitaskmodeling`` refuses to be imported until its licence is accepted by the user."""

    code = "licence_not_accepted"

    def __init__(self) -> None:
        super().__init__(
            "The licence of medicalmultitaskmodeling (mmm) has not been accepted.",
            hint=(
                f"Read it at {LICENCE_URL} (non-commercial research only, no diagnostic use). "
                'If you agree, set the variable yourself: MMM_LICENSE_ACCEPTED="i accept"'
            ),
        )


# --- where a slide comes from -----------------------------------------------------------------------------------


class SourceError(BackendError):
    """The slide of a task could not be found or may not be opened."""

    code = "source_error"
    http_status = 400


class TaskFieldMissing(SourceError):
    """The task has no value in the field that the labelling config points to."""

    code = "task_field_missing"


class SlideNotFound(SourceError):
    """Nothing is stored at the slide's location."""

    code = "slide_not_found"
    http_status = 404


class SourceRefused(SourceError):
    """The location lies outside the places that the settings allow."""

    code = "source_refused"
    http_status = 403


class DownloadFailed(SourceError):
    """The slide is on another machine that did not deliver it; trying later may work."""

    code = "download_failed"
    retryable = True
    http_status = 502


# --- reading a slide --------------------------------------------------------------------------------------------


class SlideError(BackendError):
    """The slide was found, but cannot be analysed."""

    code = "slide_error"
    http_status = 422


class SlideUnreadable(SlideError):
    """No reader understands the file, or it is damaged."""

    code = "slide_unreadable"


class FormatUnsupported(SlideError):
    """The file is of a known format, or of a known kind of it, that no reader here reads; it is not damaged."""

    code = "format_unsupported"


class CodecUnsupported(SlideError):
    """The pixels are compressed in a way that no reader here decodes; the message names it."""

    code = "codec_unsupported"


class ChannelsUnsupported(SlideError):
    """The image has channels (of fluorescence, for example) where the model needs the colours of brightfield; the
    message names them.
    """

    code = "channels_unsupported"


class DicomUnsupported(SlideError):
    """A DICOM object that is no whole slide with a pyramid; the message says what it is."""

    code = "dicom_unsupported"


class SlideTooLarge(SlideError):
    """A plain image whose decoded size is over ``IMAGE_MAX_PIXELS``, probably a decompression bomb; or a view of a slide without coarse levels."""

    code = "slide_too_large"


class SlideTooSmall(SlideError):
    """The image is smaller than one tile."""

    code = "slide_too_small"


class SlideTooCoarse(SlideError):
    """The slide's pixels are much larger than those of a tile: enlarging it would show the model cells that nobody scanned."""

    code = "slide_too_coarse"


class MppUnknown(SlideError):
    """Neither the slide, nor the task, nor the settings say how large a pixel is."""

    code = "mpp_unknown"


class NoTissue(SlideError):
    """The slide was read, and there is no tissue on it."""

    code = "no_tissue"


class TissueMaskInvalid(SlideError):
    """The tissue mask that was given with a slide cannot be used: unreadable, empty, too large, or of another slide."""

    code = "tissue_mask_invalid"


class TileOutside(SlideError):
    """The deep-zoom tile or region that was asked for does not lie on the slide."""

    code = "tile_outside"
    http_status = 404


# --- the model --------------------------------------------------------------------------------------------------


class ModelError(BackendError):
    """The checkpoint cannot be used."""

    code = "model_error"


class CheckpointUnreadable(ModelError):
    """The checkpoint is missing, is not a zip of blocks, or does not match its pinned SHA-256."""

    code = "checkpoint_unreadable"


class CheckpointRefused(ModelError):
    """The checkpoint holds something that a model does not need, or unpacks to more than one has; nothing of it was executed."""

    code = "checkpoint_refused"


class BlockBroken(ModelError):
    """One of encoder, squeezer, grouper is missing or does not fit; the message names it."""

    code = "block_broken"


class ModelMismatch(ModelError):
    """A worker runs another model, or other tile settings, than the process that asked. One that fits can do it."""

    code = "model_mismatch"
    retryable = True


class DeviceUnavailable(ModelError):
    """The device asked for is not on this machine."""

    code = "device_unavailable"


class DeviceFailed(ModelError):
    """The device has failed in a way that the process does not recover from; another process may."""

    code = "device_failed"
    retryable = True


class OutOfDeviceMemory(ModelError):
    """Even a batch of one tile does not fit into the device's memory."""

    code = "out_of_device_memory"


# --- results, queue, Label Studio -------------------------------------------------------------------------------


class ResultDamaged(BackendError):
    """A stored result cannot be read back; it has been set aside."""

    code = "result_damaged"
    retryable = True


class ResultDamagedAgain(ResultDamaged):
    """A stored result was damaged time and again: something is wrong with the disk, and computing it once more does not help."""

    code = "result_damaged_again"
    retryable = False


class StoreUnavailable(BackendError):
    """A result cannot be written or opened now: the disk is full, files may not be opened, the store does not answer. Trying later may work."""

    code = "store_unavailable"
    retryable = True
    http_status = 503


class ResultNotFound(BackendError):
    """Nothing is stored under this bag key."""

    code = "result_not_found"
    http_status = 404


class QueueUnavailable(BackendError):
    """Redis does not answer."""

    code = "queue_unavailable"
    retryable = True
    http_status = 503


class RedisUnfit(BackendError):
    """Redis answers, and is one that the queue cannot work with: too old, a cluster, a replica."""

    code = "redis_unfit"
    http_status = 503


class JobTimedOut(BackendError):
    """The job ran longer than ``JOB_TIMEOUT_S``."""

    code = "job_timed_out"


class JobNotFound(BackendError):
    """No job of this id is listed any more."""

    code = "job_not_found"
    http_status = 404


class JobRefused(BackendError):
    """The job in Redis names something that our workers do not run; nothing of it was imported."""

    code = "job_refused"


class WorkerDied(BackendError):
    """The worker was killed or crashed while it ran the job, as often as the job may be tried."""

    code = "worker_died"


class EmbeddingInvalid(BackendError):
    """An embedding or latent that is to teach, or to be judged, is not a finite vector; the message names it."""

    code = "embedding_invalid"
    http_status = 422


class HeadMismatch(BackendError):
    """A head was trained on other embeddings than the ones it is asked about."""

    code = "head_mismatch"
    http_status = 409


class HeadNotFound(BackendError):
    """No heads are stored under this model version."""

    code = "head_not_found"
    http_status = 404


class HeadDamaged(BackendError):
    """Stored heads cannot be read back."""

    code = "head_damaged"


class TrainingFailed(BackendError):
    """A worker tried to train a project's heads, and failed; the message has its reason."""

    code = "training_failed"


class TrainingRuns(BackendError):
    """The project's heads are being trained right now, so they cannot be replaced by hand."""

    code = "training_runs"
    retryable = True
    http_status = 409


class LabelStudioError(BackendError):
    """Label Studio answered, and refused what was asked."""

    code = "label_studio_error"
    http_status = 502


class LabelStudioUnreachable(LabelStudioError):
    """Label Studio does not answer, or answers 5xx; trying later may work."""

    code = "label_studio_unreachable"
    retryable = True


class PushUnsure(LabelStudioUnreachable):
    """Label Studio was sent a prediction and did not answer: it may have it, or get it later still."""

    code = "push_unsure"


class ProjectNotFound(LabelStudioError):
    """Label Studio has no project of this number or title."""

    code = "project_not_found"
    http_status = 404


class LabelStudioNotStarted(BackendError):
    """The Label Studio that the demo or a test runs could not be installed or started."""

    code = "label_studio_not_started"


class LabelConfigUnsupported(BackendError):
    """The labelling config has no control that this backend can fill."""

    code = "label_config_unsupported"
    http_status = 400


class InvalidPrediction(BackendError):
    """A prediction failed its own check before it was sent: a defect of ours, never sent to Label Studio."""

    code = "invalid_prediction"


class ExportUnsupported(BackendError):
    """The result cannot be written in the form that was asked for."""

    code = "export_unsupported"
    http_status = 400


class FileExists(BackendError):
    """The file that is to be written is there already."""

    code = "file_exists"
    http_status = 409


class OutputUnusable(BackendError):
    """The place that results are to be written to is a file, may not be written, or is full."""

    code = "output_unusable"


class UnexpectedFailure(BackendError):
    """A library failed on one slide in a way that has no error of its own here; the log has the traceback."""

    code = "unexpected_failure"


class ExtraMissing(BackendError):
    """What was asked for needs packages that are installed only on request."""

    code = "extra_missing"


class RequestInvalid(BackendError):
    """The HTTP request's body is not what the protocol says."""

    code = "request_invalid"
    http_status = 400


# --- web --------------------------------------------------------------------------------------------------------


class SignatureInvalid(BackendError):
    """The signature in an address is missing or wrong."""

    code = "signature_invalid"
    http_status = 403


class OriginRefused(BackendError):
    """A page of another site asked for a change."""

    code = "origin_refused"
    http_status = 403


class PanelNotBuilt(BackendError):
    """The parts that the panel's pages load were not installed."""

    code = "panel_not_built"
    http_status = 503
