"""The services behind the gateway: their channels, their health, what they serve.

Each peer is watched through grpc.health.v1 and asked again from time to time (a watch alone can
miss a change where a server forgets a watcher). A peer that is lost is tried again, at first soon,
then less often. Chooses the drafter for a request; the gateway is ready when the target is.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Generic, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.clients import ASK_TIMEOUT_S, RETRY_S, DrafterClient, TargetClient
from skim.errors import NotFound, SkimError, Unavailable
from skim.log import get_logger
from skim.rpc import connect
from skim.rpc_errors import from_rpc_error
from skim.v1 import drafter_pb2, target_pb2
from skim.v1.gateway_pb2 import MODEL_KIND_DRAFTER, MODEL_KIND_TARGET, Model

FIRST_BACKOFF_S, MOST_BACKOFF_S = 0.1, 2.0
HEALTH_SERVICE = "readiness"
# How long a request waits for a target that answers and is not ready: an engine that died is back
# in seconds (16 GB of weights in the page cache load in 4 s), and only its own requests shall fail.
RESTART_S = 15.0

Description = TypeVar("Description")


class Peer(Generic[Description]):
    """One service: whether it answers, and its description from when it last began to.

    Args:
        name: for people and logs.
        channel: to the service.
        describe: asks it what it serves.
        interval_s: how often to ask for its health beside watching it.
    """

    def __init__(
        self,
        name: str,
        channel: grpc.aio.Channel,
        describe: Callable[[], Awaitable[Description]],
        interval_s: float,
    ) -> None:
        self.name = name
        self.channel = channel
        self.serving = False
        self.problem = f"{name} has not answered yet"
        self.description: Description | None = None
        self._answers = False
        self._describe = describe
        self._interval_s = interval_s
        self._changed = asyncio.Condition()

    async def watch(self) -> None:
        """Follow the peer's health until cancelled."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                async with contextlib.aclosing(self._health()) as health:
                    async for serving in health:
                        await self._heard(serving)
                        backoff_s = FIRST_BACKOFF_S
                await self._set(False, f"{self.name} has ended its watch")
            except grpc.aio.AioRpcError as failure:
                await self._set(False, f"{self.name} is unreachable", from_rpc_error(failure))
            except SkimError as error:
                await self._set(False, f"{self.name} does not say what it serves", error)
            self._answers = False
            # Spread, so that many gateways do not knock at the same moment.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(MOST_BACKOFF_S, 2 * backoff_s)

    async def until(self, serving: bool) -> None:
        """Wait until the peer serves, or does not."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.serving is serving)

    async def wait_out_restart(self) -> None:
        """Wait a moment for a peer that has served and still answers, but is not ready now."""
        if not self.serving and self._answers and self.description is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESTART_S):
                    await self.until(True)

    async def _heard(self, serving: bool) -> None:
        if serving and not self.serving:
            self.description = await self._describe()
        self._answers = True
        await self._set(serving, "" if serving else f"{self.name} is not ready")

    async def _set(self, serving: bool, problem: str, cause: SkimError | None = None) -> None:
        if serving != self.serving:
            get_logger().info(
                "peer_serving" if serving else "peer_lost",
                peer=self.name,
                cause=cause.message if cause else "",
            )
        async with self._changed:
            self.serving, self.problem = serving, problem
            self._changed.notify_all()

    async def _health(self) -> AsyncGenerator[bool, None]:
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        question = health_pb2.HealthCheckRequest(service=HEALTH_SERVICE)
        call = stub.Watch(question)
        reading = asyncio.ensure_future(call.read())
        try:
            while True:
                done, _ = await asyncio.wait({reading}, timeout=self._interval_s)
                if done:
                    reply = reading.result()
                    if reply is grpc.aio.EOF:
                        return
                    reading = asyncio.ensure_future(call.read())
                else:
                    reply = await stub.Check(question, timeout=ASK_TIMEOUT_S)
                yield reply.status == health_pb2.HealthCheckResponse.SERVING
        finally:
            call.cancel()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


class Peers:
    """The target and the drafters of one gateway.

    Args:
        target: address.
        drafters: name and address of each, the default first.
        interval_s: see `Peer`.
    """

    def __init__(self, target: str, drafters: list[tuple[str, str]], interval_s: float) -> None:
        channel = connect(target)
        self.target_client = TargetClient(channel)
        self.target: Peer[target_pb2.GetTargetResponse] = Peer(
            "the target", channel, self.target_client.describe, interval_s
        )
        self.drafter_clients: dict[str, DrafterClient] = {}
        self.drafters: dict[str, Peer[drafter_pb2.GetDrafterResponse]] = {}
        for name, address in drafters:
            channel = connect(address)
            client = DrafterClient(channel)
            self.drafter_clients[name] = client
            self.drafters[name] = Peer(f"drafter {name!r}", channel, client.describe, interval_s)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to watch them."""
        self._tasks = [asyncio.create_task(peer.watch()) for peer in self._all()]

    async def close(self) -> None:
        """Stop watching, close the channels."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for peer in self._all():
            await peer.channel.close()

    def models(self) -> list[Model]:
        """What this gateway can use, the target first, then the drafters by name."""
        target = self.target.description
        models = [
            Model(
                name=target.model if target else "",
                kind=MODEL_KIND_TARGET,
                serving=self.target.serving,
                detail=self.target.problem,
                model_digest=target.model_digest if target else "",
                max_prompt_tokens=target.full_max_tokens if target else 0,
                chat=bool(target and target.chat),
            )
        ]
        for name, peer in sorted(self.drafters.items()):
            drafter = peer.description
            models.append(
                Model(
                    name=name,
                    kind=MODEL_KIND_DRAFTER,
                    serving=peer.serving,
                    detail=peer.problem,
                    model_digest=drafter.model_digest if drafter else "",
                    max_prompt_tokens=drafter.max_prompt_tokens if drafter else 0,
                )
            )
        return models

    def _all(self) -> list[Peer[Any]]:
        return [self.target, *self.drafters.values()]

    def require_target(self, model: str) -> target_pb2.GetTargetResponse:
        """The target's description.

        Raises:
            Unavailable: it does not serve now.
            NotFound: it serves another model than `model` (empty: any).
        """
        description = self.target.description
        if not self.target.serving or description is None:
            raise Unavailable(
                self.target.problem or "the target is not ready",
                reason="TARGET_UNAVAILABLE",
                retry_after_s=RETRY_S,
            )
        if model and model != description.model:
            raise NotFound(
                f"this gateway serves {description.model!r}, not {model!r}",
                field="config.model",
                got=model,
                allowed=description.model,
            )
        return description

    def choose_drafter(self, name: str) -> tuple[str, str | None]:
        """Choose the drafter for a request: the named one, or else the first that serves.

        Returns:
            Its name, and None; or "" and the sentence that says why none can be asked.
        Raises:
            NotFound: no drafter has this name.
        """
        if name and name not in self.drafters:
            raise NotFound(
                f"this gateway has no drafter {name!r}",
                field="config.drafter",
                got=name,
                allowed=", ".join(self.drafters) or "none",
            )
        candidates = [name] if name else list(self.drafters)
        for candidate in candidates:
            if self.drafters[candidate].serving:
                return candidate, None
        problems = [self.drafters[candidate].problem for candidate in candidates]
        return "", "; ".join(problems) or "this gateway has no drafter"
