"""The HTTP interface of a served model: endpoints, limits, keys, metrics, a page for people."""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.security import APIKeyHeader
from prometheus_client import (
    CollectorRegistry,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
)

from .. import __version__
from ..errors import DataError
from .batching import Batcher, QueueFullError
from .requests import (
    Add,
    AddVector,
    Change,
    Recommend,
    Remove,
    RequestError,
    SetAvailability,
    SwapModel,
)
from .service import Service

__all__ = [
    "MAX_BODY",
    "MAX_HISTORY",
    "MAX_K",
    "Metrics",
    "ServerConfig",
    "is_loopback",
    "make_app",
]

MAX_K = 200
"""Items that one request may ask for."""
MAX_HISTORY = 1000
"""Items of a history."""
MAX_LIST = 10_000
"""Items of ``exclude`` and of ``available``."""
MAX_BODY = 1 << 20
"""Bytes of a request's body."""
MAX_WAITING = 1024
"""Requests that may wait for a search; more are answered 503 at once."""

_LOG = logging.getLogger(__name__)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


@dataclass(frozen=True)
class ServerConfig:
    """How a model is served.

    Attributes:
        host: the address that is listened on.
        port: the port.
        api_key: what clients must send as ``X-API-Key``; None, which only a loopback address may
            have: nothing.
        max_batch: requests that are searched for together.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_batch: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65_535:
            raise ValueError(f"--port must be 1 to 65535; got {self.port}")
        if self.max_batch < 1:
            raise ValueError(f"--batch-size must be at least 1; got {self.max_batch}")
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} is not this machine alone; give --api-key-file, too"
            )
        if self.api_key is not None and not (len(self.api_key) >= 16 and self.api_key.isascii()):
            raise ValueError("--api-key-file must hold at least 16 characters of ASCII")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


Item = StrictInt | StrictStr


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Asked(_Body):
    """Who asks, a user of the dataset or a history of items, oldest first; and which model."""

    user: Item | None = None
    history: list[Item] | None = Field(None, max_length=MAX_HISTORY)
    beside: StrictBool = False


class RecommendBody(Asked):
    """A request for items; see :class:`~gflowgr.serving.requests.Recommend`."""

    k: StrictInt = Field(10, ge=1, le=MAX_K)
    exclude: list[Item] = Field([], max_length=MAX_LIST)
    available: list[Item] | None = Field(None, max_length=MAX_LIST)
    mask_seen: StrictBool = True
    with_scores: StrictBool = False
    with_titles: StrictBool = False

    def request(self) -> Recommend:
        """The same as plain data."""
        values = self.model_dump()
        for name in ("history", "exclude", "available"):
            values[name] = None if values[name] is None else tuple(values[name])
        return Recommend(**{**values, "user": None if self.user is None else str(self.user)})


class ItemBody(_Body):
    """A new item by its identifier, vector or text; see :class:`~gflowgr.serving.requests.Add`."""

    id: StrictStr
    identifier: list[StrictInt] | None = Field(None, min_length=1, max_length=1000)
    vector: list[StrictFloat | StrictInt] | None = Field(None, min_length=1, max_length=MAX_LIST)
    text: StrictStr | None = Field(None, max_length=10_000)
    title: StrictStr | None = Field(None, max_length=1000)
    share: StrictBool = False


class AvailabilityBody(_Body):
    """Whether an item may be recommended."""

    available: StrictBool


class ModelBody(_Body):
    """The folder of a saved model, on the server's machine."""

    model: StrictStr = Field(min_length=1, max_length=4096)


class Metrics:
    """What Prometheus reads; each app has its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            "gflowgr_request_seconds",
            "Time from a request to its answer",
            ["path", "status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "gflowgr_batch_size",
            "Requests that were searched for together",
            buckets=_BATCHES,
            registry=self.registry,
        )
        self.waiting = Gauge(
            "gflowgr_requests_waiting",
            "Requests under way or waiting for a search",
            registry=self.registry,
        )
        self.version = Gauge(
            "gflowgr_catalogue_version", "Changes of the catalogue so far", registry=self.registry
        )
        ProcessCollector(registry=self.registry)

    def families(self, labels: dict[str, str]) -> list[Any]:
        """What has been counted, as prometheus_client has it; every series gets the labels."""
        families = list(self.registry.collect())
        for family in families:
            family.samples = [
                sample._replace(labels={**sample.labels, **labels}) for sample in family.samples
            ]
        return families


class _Collected:
    """Families in the place of a registry."""

    def __init__(self, families: Iterable[Any]) -> None:
        self.families = families

    def collect(self) -> Iterable[Any]:
        return self.families


def make_app(
    service: Service,
    config: ServerConfig,
    metrics: Metrics | None = None,
    collect: Callable[[], Awaitable[Sequence[Any]]] | None = None,
) -> FastAPI:
    """The application, for any ASGI server.

    Args:
        service: the model and its catalogue.
        config: who may ask, and how many requests are searched for together.
        metrics: what this application counts; None: new ones.
        collect: gives the families of the metrics of all replicas; None: there is this one alone.
    """
    app = FastAPI(title="gflowgr", version=__version__, docs_url="/docs", redoc_url=None)
    metrics = Metrics() if metrics is None else metrics
    batcher = Batcher(
        service.answer,
        max_batch=config.max_batch,
        max_waiting=MAX_WAITING,
        observe=metrics.batch.observe,
    )
    metrics.waiting.set_function(lambda: batcher.waiting)
    metrics.version.set_function(lambda: service.catalogue().version)
    header = APIKeyHeader(name="X-API-Key", auto_error=False)

    def with_key(given: str | None = Depends(header)) -> None:
        wanted = config.api_key
        if wanted is not None and not hmac.compare_digest(
            (given or "").encode(errors="replace"), wanted.encode()
        ):
            raise HTTPException(401, "the header X-API-Key must hold the server's key")

    keyed = [Depends(with_key)]

    def changed(change: Change | AddVector, request: Request) -> dict[str, int]:
        line = service.change(change, request.client.host if request.client else "unknown")
        _LOG.info("catalogue changed: %s", line)
        return {"version": json.loads(line)["version"]}

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        begin = time.perf_counter()
        refused = _refusal(request, config)
        response = refused or await answer(request)
        route = request.scope.get("route")
        path = getattr(route, "path", "other")  # never the raw path: labels must be few
        metrics.seconds.labels(path, str(response.status_code)).observe(time.perf_counter() - begin)
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        found = [{key: each[key] for key in ("loc", "msg", "type")} for each in error.errors()]
        return _json({"detail": found}, 422)

    @app.exception_handler(RequestError)
    async def impossible(_: Request, error: RequestError) -> Response:
        found = {"loc": ["body", error.field], "msg": str(error), "type": "value_error"}
        return _json({"detail": [found]}, 422)

    @app.exception_handler(DataError)
    async def stuck(_: Request, error: DataError) -> Response:
        _LOG.error("%s", error)
        return _json({"detail": "the catalogue's changes cannot be read; see the log"}, 503)

    @app.exception_handler(QueueFullError)
    async def busy(_: Request, error: QueueFullError) -> Response:
        response = _json({"detail": f"{MAX_WAITING} requests wait already"}, 503)
        response.headers["Retry-After"] = "1"
        return response

    @app.post("/recommend", dependencies=keyed)
    async def recommend(body: RecommendBody) -> dict[str, Any]:
        """Items for a user or a history, best first."""
        found = await batcher(body.request())
        if isinstance(found, RequestError):
            raise found
        return found

    @app.post("/tree", dependencies=keyed)
    def tree(body: Asked) -> dict[str, Any]:
        """The history with its titles, and the flow through the first two levels of the tree."""
        history = None if body.history is None else tuple(body.history)
        user = None if body.user is None else str(body.user)
        return service.beginnings(Recommend(user, history, beside=body.beside))

    @app.post("/items", dependencies=keyed)
    def add(body: ItemBody, request: Request) -> dict[str, int]:
        """Add an item to the catalogue, or bring back one that was removed."""
        given = {"identifier", "vector", "text"} & body.model_dump(exclude_none=True).keys()
        if len(given) != 1:
            raise RequestError(
                "identifier",
                "one of identifier, vector and text must be given; got "
                f"{' and '.join(sorted(given)) or 'none'}",
            )
        if body.identifier is None:
            vector = tuple(body.vector or ()) or service.vector(body.text or "")
            return changed(AddVector(body.id, vector, body.title), request)
        codes = tuple(body.identifier)
        return changed(Add(body.id, codes, body.title, body.share), request)

    @app.delete("/items/{item:path}", dependencies=keyed)
    def remove(item: str, request: Request) -> dict[str, int]:
        """Remove an item; histories may still hold it."""
        return changed(Remove(item), request)

    @app.put("/items/{item:path}/availability", dependencies=keyed)
    def availability(item: str, body: AvailabilityBody, request: Request) -> dict[str, int]:
        """Say whether an item may be recommended."""
        return changed(SetAvailability(item, body.available), request)

    @app.post("/model", dependencies=keyed)
    def swap(body: ModelBody, request: Request) -> dict[str, int]:
        """Go over to another checkpoint of the same items; no request sees half of each."""
        return changed(SwapModel(body.model), request)

    @app.get("/health")
    def health() -> dict[str, Any]:
        """Whether requests are answered, and from which catalogue."""
        catalogue = service.catalogue()
        return {"status": "ok", "version": catalogue.version, "items": len(catalogue.tree.item_ids)}

    @app.get("/metrics", dependencies=keyed)
    async def prometheus() -> Response:
        """Latency, batch sizes, queue and memory of every replica, for Prometheus."""
        source: Any = metrics.registry if collect is None else _Collected(await collect())
        return Response(generate_latest(source), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        text = (files("gflowgr.serving") / "page.html").read_text(encoding="utf-8")
        return HTMLResponse(text)

    return app


def _refusal(request: Request, config: ServerConfig) -> Response | None:
    """The answer to a request that must not be read at all."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    # A page of another site, open in a browser here, must not change the catalogue.
    if origin is not None and (not host or _address(origin) != host):
        return _json({"detail": f"the Origin must be {host}; got {origin}"}, 403)
    if is_loopback(config.host) and not is_loopback(_address(f"//{host}", port=False)):
        return _json({"detail": f"the Host must be a loopback address; got {host}"}, 403)
    length = request.headers.get("content-length", "")
    if request.method in ("POST", "PUT") and not (length.isdecimal() and int(length) <= MAX_BODY):
        message = f"the body must have a Content-Length of at most {MAX_BODY} bytes"
        return _json({"detail": message}, 413 if length else 411)
    return None


def _address(url: str, *, port: bool = True) -> str:
    """Host and port of a URL; "" where it is none."""
    try:
        parts = urlsplit(url)
        return parts.netloc if port else parts.hostname or ""
    except ValueError:
        return ""


def _json(value: Any, status: int) -> Response:
    # Escaped: what a client sends may hold characters that UTF-8 cannot.
    return Response(json.dumps(value), status, media_type="application/json")
