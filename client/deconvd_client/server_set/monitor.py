"""Watches several servers: it takes their calls from those that are silent, and finds those that are back."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Final, Generic, TypeVar

from deconvd.errors import CallCancelledError, DeadlineError, DeconvdError, UnavailableError
from deconvd.host.forks import register_fork_reset
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.uninterrupted import run_in_background
from deconvd_client.server_set.background_loop import BackgroundLoop
from deconvd_client.server_set.balancer import Balancer, Member, MemberState
from deconvd_client.server_set.member_source import MemberSource
from deconvd_client.server_set.replica import Replica

__all__ = ["Monitor"]

_R = TypeVar("_R", bound=Replica)

_SILENCE_S: Final = 0.4
"""How long a server with a running call may give no sign of life before it is probed."""

_PROBE_TIMEOUT_S: Final = 1.0
"""How long a server may take to answer a probe. With `_SILENCE_S` that is less than the two seconds a call may lose."""

_TICK_S: Final = 0.1
"""How often the running calls are looked at."""

_SUSPECT_PAUSE_S: Final = 0.5
"""How often a server is probed that refuses calls: it may just be full, and then it has enough to do."""

_IDLE_S: Final = 3600.0

_RETIRED_PROBE_S: Final = 5.0
"""How often it is asked whether a server still exists that is no longer among the configured ones."""

_SERVING: Final = "SERVING"

_log = logging.getLogger(__name__)


class Monitor(Generic[_R]):
    """Probes the members of a balancer, by gRPC's health protocol, where there is a reason to. Thread-safe.

        a call runs, and no sign of life for a while   probed; if it is silent it is OUT, and its calls go elsewhere
        it refused a call                              probed; if it drains it is OUT, and its calls go on
        it is OUT                                      probed after a pause, which grows; if it serves it is back
        it is RETIRED                                  probed now and then; closed once it is gone

    A server that answers is not probed, and where no calls are made nothing is sent.

    Args:
        balancer: Has the members.
        membership: Says which members there are, and how they are probed.
    """

    def __init__(self, balancer: Balancer[_R], membership: MemberSource[_R]) -> None:
        self._balancer = balancer
        self._membership = membership
        self._loop = BackgroundLoop(self._look)
        self._probing: set[Member[_R]] = set()
        self._suspects: set[Member[_R]] = set()
        self._was_used = False  # since the last look
        self._is_lookup_wanted = False  # a call was made since the last one
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Forget the probes of the parent."""
        self._probing.clear()
        self._suspects.clear()

    def note_call(self) -> None:
        """Note that a call begins."""
        self._was_used = True
        if self._loop.is_asleep:
            self._loop.wake()

    def note_refusal(self, member: Member[_R]) -> None:
        """Have a member probed soon: it refuses calls, and perhaps drains."""
        self._suspects.add(member)
        self._loop.wake()

    def note_failure(self) -> None:
        """Look after members that have failed."""
        self._membership.note_failure()
        self._is_lookup_wanted = True
        self._loop.wake()

    def close(self) -> None:
        """Watch nothing any more."""
        self._loop.close()

    def _look(self) -> float:
        """Probe what is due, and return in how many seconds to look again."""
        next_s = _IDLE_S
        if self._was_used:
            # The loop sleeps only once no more calls are made, so that few of them must wake it.
            self._was_used, self._is_lookup_wanted = False, True
            next_s = _TICK_S
        for member in self._balancer.members:
            next_s = min(next_s, self._look_at(member))
        if self._is_lookup_wanted:
            lookup_s = self._membership.next_lookup_s
            if not lookup_s:
                self._is_lookup_wanted = False
                self._membership.refresh()
            next_s = min(next_s, lookup_s or _TICK_S)
        return next_s

    def _look_at(self, member: Member[_R]) -> float:
        """Probe one member if that is due; return in how many seconds to look at it again."""
        if member in self._probing:
            return _TICK_S
        match member.state:
            case MemberState.RETIRED:
                if time.monotonic() - member.sign_s > _RETIRED_PROBE_S:
                    self._probe(member, 1.0)
                return _RETIRED_PROBE_S
            case MemberState.OUT:
                next_s = member.next_probe_s
                if not next_s:
                    self._probe(member, 1.0)
                return next_s or _TICK_S
        if member in self._suspects and time.monotonic() - member.probe_s > _SUSPECT_PAUSE_S:
            self._suspects.discard(member)
            self._probe(member, 1.0)
            return _TICK_S
        running = [(attempt.began_s, attempt.patience) for attempt in [*member.attempts]]
        if not running:
            return _SUSPECT_PAUSE_S if member in self._suspects else _IDLE_S
        patience = min(patience for _, patience in running)
        silent_since_s = max(min(began_s for began_s, _ in running), member.sign_s)
        if time.monotonic() - silent_since_s >= _SILENCE_S * patience:
            self._probe(member, patience)
        return _TICK_S

    def _probe(self, member: Member[_R], patience: float) -> None:
        """Ask a member for its health, in the background."""
        self._probing.add(member)
        member.probe_s = time.monotonic()
        run_in_background(partial(self._ask, member, patience))

    def _ask(self, member: Member[_R], patience: float) -> None:
        name = member.identity.decode()
        was_out = member.state is MemberState.OUT
        try:
            health = self._membership.probe(member, Deadline(_PROBE_TIMEOUT_S * patience))
        except DeadlineError:
            self._note_silence(member, UnavailableError(f"the server at {name} does not answer"))
        except UnavailableError as error:
            self._note_absence(member, error)
        except CallCancelledError as error:  # it stops
            self._note_absence(member, UnavailableError(f"the server at {name} stops: {error}"))
        except DeconvdError as error:
            # an answer all the same: it has no health service, say
            _log.debug("%s answers a probe with %s", name, error)
            self._balancer.note_health(member)
        else:
            if health == _SERVING:
                self._balancer.note_health(member)
                if was_out:
                    _log.info("the server at %s is back", name)
            else:
                why = UnavailableError(f"the server at {name} takes no calls: {health}")
                self._balancer.note_failure(member, why)
        finally:
            self._probing.discard(member)
            self._loop.wake()

    def _note_silence(self, member: Member[_R], error: UnavailableError) -> None:
        for attempt in self._balancer.note_silence(member, error):
            attempt.scope.cancel(str(error))
        if member.state is not MemberState.SERVING:
            _log.info("%s: it gets no calls, and is probed", error)
            self._note_absence(member, error)

    def _note_absence(self, member: Member[_R], error: UnavailableError) -> None:
        if member.state is MemberState.RETIRED and not member.attempts:
            self._balancer.remove(member)
            member.server.close()
            return
        self._balancer.note_failure(member, error)
        self._membership.note_failure()
        self._is_lookup_wanted = True
