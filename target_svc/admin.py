"""The target's admin port: drain and configuration; `memory/service.py` is its other service.

Called by operators and by `skim doctor`, on loopback by default. Drafter models belong to the
drafter's service, which this says in a sentence.
"""

from __future__ import annotations

from skim import admin
from skim.rpc import RpcServer
from target_svc.config import TargetSettings


class AdminServicer(admin.AdminServicer):
    """Answers AdminService for one target."""

    def __init__(self, settings: TargetSettings, server: RpcServer) -> None:
        super().__init__(
            settings, server, "a target has no drafter models; ask the drafter's admin port"
        )
