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


def instruction_sets() -> list[str]:
    """Every one that can be run; "scalar" without a build, and then `native` tells the test."""
    try:
        from tunesmith import _native
    except ImportError:
        return ["scalar"]
    return _native.isas()


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest, native: ModuleType) -> Iterator[str]:
    """Each instruction set that this build has and this CPU can run, forced in turn."""
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)
