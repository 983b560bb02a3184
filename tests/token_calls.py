"""Calls with a token by the generated stubs, and files of tokens, for tests from the outside."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

from deconvd_server.access.tokens import TokenHash

__all__ = ["channel_with_token", "write_tokens"]


def write_tokens(path: Path, tokens: Mapping[str, str]) -> Path:
    """Replace a file of tokens, as an operator does; return its path.

    Args:
        tokens: Names by tokens.
    """
    staged = path.with_suffix(".new")
    staged.write_text(
        "".join(f"{TokenHash.of(name, token).as_line()}\n" for token, name in tokens.items())
    )
    staged.chmod(0o600)
    os.replace(staged, path)
    return path


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds a token to every call."""

    def __init__(self, token: str) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),)

    def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        """Make the call with the token."""
        return continuation(client_call_details._replace(metadata=self._metadata), request)

    def intercept_unary_stream(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        """Make the call with the token."""
        return self.intercept_unary_unary(continuation, client_call_details, request)

    def intercept_stream_unary(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        """Make the call with the token."""
        return self.intercept_unary_unary(continuation, client_call_details, request_iterator)

    def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        """Make the call with the token."""
        return self.intercept_unary_unary(continuation, client_call_details, request_iterator)


def channel_with_token(target: str, token: str) -> grpc.Channel:
    """Return a channel whose calls have a token; without one if it is empty."""
    channel = grpc.insecure_channel(target)
    return grpc.intercept_channel(channel, _Bearer(token)) if token else channel
