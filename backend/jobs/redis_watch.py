"""How Redis is, looked at every few seconds beside the requests, so that no request for the backend's health waits for it."""

from __future__ import annotations

import logging
import threading

from redis import Redis
from redis.exceptions import RedisError

from backend.errors import BackendError, RedisUnfit
from backend.jobs.redis_health import Remark, need_fit, unavailable
from backend.jobs.redis_server import connect
from backend.redaction import shown_address
from backend.settings import Settings

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
_TIMEOUT_S = 2.0


class RedisWatch:
    """Looks, remembers what it saw, and says it in the log: at first, and when it has changed.

    Attributes
    ----------
    problem
        Why the queue cannot be used, as of the last look; ``None`` if it can, or nobody has looked yet.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._where = shown_address(settings.redis_url.get_secret_value()) or "the embedded one"
        self._client: Redis | None = None
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self.problem: BackendError | None = None

    def look(self) -> BackendError | None:
        """Look now; takes some seconds at most. Returns :attr:`problem`."""
        with self._lock:
            found: BackendError | None = None
            try:
                if self._client is None:
                    self._client = connect(self._settings, check=False, timeout_s=_TIMEOUT_S)
                self._tell(need_fit(self._client, self._where))
            except RedisUnfit as error:
                found = error
            except RedisError as error:
                found = unavailable(error, self._settings)
            before, self.problem = self.problem, found  # only now: the last look counts while this one waits
            if found is not None and str(found) != str(before):
                log.error("%s Slides cannot be queued until then.", found)
            elif before is not None and found is None:
                log.info("Redis is back")
            return found

    def need(self) -> None:
        """Look, for a process that starts: a Redis that cannot be used at all ends it, one that is away is waited for.

        Raises
        ------
        RedisUnfit
            Redis is too old, a cluster, or a replica.
        """
        if isinstance(problem := self.look(), RedisUnfit):
            raise problem

    def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            self._client.close()

    def _tell(self, remarks: list[Remark]) -> None:
        for remark in remarks:
            if remark.hint not in self._told:  # its text has numbers, which change
                log.warning("Redis at %s: %s. %s", self._where, remark.text, remark.hint)
        self._told = {remark.hint for remark in remarks}
