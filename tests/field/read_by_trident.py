"""Run as ``python read_by_trident.py EXPORT SLIDE NAME WORK`` with TRIDENT on the path: what its own code makes of our
files, as JSON.

EXPORT is the folder that ``export-features --layout trident`` wrote, SLIDE the slide's file, NAME its name in the
export, WORK a folder to write to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import h5py
import numpy as np
import torch
from torchvision import transforms
from trident import OpenSlideWSI, visualize_heatmap
from trident.IO import read_coords
from trident.slide_encoder_models import ABMILSlideEncoder


class MeanEncoder(torch.nn.Module):
    """A patch encoder whose feature is the mean of the patch it was given."""

    enc_name, precision, embedding_dim = "mean", torch.float32, 1
    eval_transforms = transforms.ToTensor()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (B, 1)."""
        return images.mean(dim=(1, 2, 3))[:, None]


def main(export: Path, slide: Path, name: str, work: Path) -> None:
    """Read coordinates, patches and features; encode the slide; draw the heatmap."""
    wsi = OpenSlideWSI(slide_path=str(slide), lazy_init=False, max_workers=0)
    (job,) = export.iterdir()
    path = job / "patches" / f"{wsi.name}_patches.h5"
    attributes, coords = read_coords(str(path))
    said: dict[str, object] = {"name": wsi.name, "magnification": wsi.mag, "coords": coords.tolist()}
    said["attributes"] = {key: np.asarray(value).tolist() for key, value in attributes.items()}
    patcher = wsi.create_patcher(
        patch_size=attributes["patch_size"],
        src_mag=attributes["level0_magnification"],
        dst_mag=attributes["target_magnification"],
        custom_coords=coords,
    )
    said["cut"] = patcher.patch_size_src
    wsi.visualize_coords(str(path), str(work))
    wsi.dump_patches(str(path), str(work), max_patches=3)
    said["dumped"] = len(list((work / wsi.name).iterdir()))
    own = wsi.extract_patch_features(MeanEncoder(), str(path), str(work / "features_mean"), device="cpu")
    with h5py.File(own) as h5:
        said["mean"] = [round(float(v), 4) for v in h5["features"][:, 0]]

    (features,) = job.glob("features_*")
    abmil = ABMILSlideEncoder(freeze=False, input_feature_dim=768, n_heads=1, head_dim=512, dropout=0.0, gated=True)
    encoded = wsi.extract_slide_features(str(features / f"{name}.h5"), abmil, str(work / "slide"), device="cpu")
    (slides,) = job.glob("slide_features_*")
    with (
        h5py.File(encoded) as theirs,
        h5py.File(slides / f"{name}.h5") as ours,
        h5py.File(features / f"{name}.h5") as h5,
    ):
        said["slide"] = [list(theirs["features"].shape), list(ours["features"].shape), str(ours["features"].dtype)]
        said["features"] = [list(h5["features"].shape), str(h5["features"].dtype)]
        scores, at = h5["attention"][:].mean(axis=1), h5["coords"][:]
        edge = h5["coords"].attrs["patch_size_level0"]
    picture = visualize_heatmap(
        wsi, scores, at, edge, vis_level=0, overlay_only=True, num_top_patches_to_save=1, output_dir=str(work)
    )
    from PIL import Image

    painted = np.argwhere(np.asarray(Image.open(picture)).any(axis=2))
    said["painted"] = painted.min(axis=0).tolist()[::-1]
    (work / "trident.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
