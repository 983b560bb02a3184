"""What one client can make a server take of memory: no more than its budgets and what is said here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.messages import message_from_geometry
from deconvd.geometry import Geometry
from deconvd.problem import TensorSpec
from deconvd.tensor import message_from_array, message_from_spec
from deconvd.v1 import deconvd_pb2 as pb
from tests.processes import memory_bytes, peak_memory_bytes, wait_until
from tests.servers import ServerProcess, server_process
