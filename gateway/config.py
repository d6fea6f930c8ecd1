"""The gateway's settings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from pagewire.runtime.settings import RoleSettings


class GatewaySettings(RoleSettings):
    """Owns text and foreign protocols: tokenizes, validates, streams to clients."""

    role: ClassVar[str] = "gateway"

    scheduler: str = "127.0.0.1:50052"
    """Address of the scheduler: HOST:PORT or unix:PATH. The default is the scheduler's own."""
    listen: str = "127.0.0.1:50051"
    """Where clients connect: HOST:PORT (port 0: a free one) or unix:PATH. Loopback, as there is no TLS by default."""
    http_listen: str = ""
    """Where OpenAI clients connect: HOST:PORT, such as 127.0.0.1:8000 (port 0: a free one). Empty or off: no HTTP."""
    http_max_body_bytes: int = Field(default=8 << 20, ge=1 << 10)
    """Largest HTTP body in bytes. As for gRPC messages: 8 MiB hold a million token ids."""
    metrics_port: int | None = Field(default=None, le=65535)
    """Port of the Prometheus page, on metrics_host. 0 picks a free one; unset or negative: no page."""
    metrics_host: str = "127.0.0.1"
    """Host name or address that the Prometheus page listens on. Loopback because it needs no password."""
    api_keys_file: Path | None = None
    """File with the API keys that HTTP clients must send: one KEY or KEY TENANT per line. Unset: none are asked for."""
    console: bool = True
    """Serve the console page, /console, beside the HTTP API. It shows the names of all requests to whoever may call."""
    insecure: bool = False
    """Allow plaintext on an address that other machines can reach. Off: a prompt is private."""
    model: str = ""
    """Tokenizer: a directory or a hub id. Empty: token ids only, text prompts are refused with a clear error."""
    served_model_name: str = ""
    """Name that clients may give in GenerateRequest.model. Empty: the name that the workers report."""
    default_max_tokens: int = Field(default=256, ge=1)
    """Output tokens when a request sets no max_tokens. A few paragraphs: a forgotten limit costs little."""
    reflection: bool = True
    """Serve gRPC reflection, so that clients without stubs can call. Turn it off on public addresses."""
    max_live_requests: int = Field(default=4096, ge=1)
    """Requests this gateway holds at once; more get RESOURCE_EXHAUSTED. Above what a scheduler queues and runs."""
    write_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds that one write to a client may take; then it is a slow consumer. 30 s survives a network hiccup."""
    stream_buffer_bytes: int = Field(default=1 << 20, ge=1 << 10)
    """Undelivered bytes of one stream before its client is a slow consumer. 1 MiB is some 100,000 tokens' text."""
    reattach_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds that streams wait for a lost scheduler before they end. As long as the scheduler keeps orphans."""
    chat_render_timeout_s: float = Field(default=1.0, gt=0)
    """Seconds that the model's chat template may take for one conversation. Real templates take milliseconds."""
    stop_grace_s: float = Field(default=2.0, ge=0)
    """Seconds that open calls get to end at shutdown. Clients resume the rest with Attach at another gateway."""
