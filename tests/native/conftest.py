import os
from collections.abc import Iterator
from types import ModuleType

import pytest

from tunesmith.ops import native_status


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """The compiled module, which must be there under TUNESMITH_REQUIRE_NATIVE=1 (`make test`)."""
    status = native_status()
    if not status.loaded:
        if os.environ.get("TUNESMITH_REQUIRE_NATIVE") == "1":
            pytest.fail(f"TUNESMITH_REQUIRE_NATIVE=1, but: {status}")
        pytest.skip(str(status))
    from tunesmith import _native

    return _native


@pytest.fixture(params=["scalar", "avx2"])
def isa(request: pytest.FixtureRequest, native: ModuleType) -> Iterator[str]:
    """Each instruction set in turn, forced."""
    if request.param not in native.isas():
        pytest.skip(f"this build or this CPU has no {request.param}")
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)
