"""For all tests of this folder: a kernel is launched on the device that its tensors are on."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime.interpreter import GridExecutor

    @pytest.fixture(autouse=True)
    def guarded(monkeypatch):
        """Triton launches on the current device, whatever tensors it is given."""
        devices, launch = [], GridExecutor.__call__

        class Guard:
            def __init__(self, tensor):
                self.device = tensor.device

            def __enter__(self):
                devices.append(self.device)

            def __exit__(self, *about):
                devices.pop()

        def guarded_launch(self, *args, **options):
            assert devices, f"{self.fn.__name__} is launched without torch.cuda.device_of"
            return launch(self, *args, **options)

        monkeypatch.setattr(torch.cuda, "device_of", Guard)
        monkeypatch.setattr(GridExecutor, "__call__", guarded_launch)
