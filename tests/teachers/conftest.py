import pytest
from asking import make_served_model
from fault_proxy import FaultProxy
from stub_server import StubServer
from tiny import make_tokenizer

from trl_opd.teachers.remote import RemoteTeacher


@pytest.fixture(scope="session")
def served_model():
    return make_served_model()


@pytest.fixture
def closing():
    """Things to close when the test is over, the last first."""
    things = []
    yield lambda thing: things.append(thing) or thing
    for thing in reversed(things):
        (getattr(thing, "close", None) or thing.stop)()


@pytest.fixture
def serve(served_model, closing):
    """Start a server of the tiny model."""
    return lambda **options: closing(
        StubServer(options.pop("model", served_model), options.pop("tokenizer", None) or make_tokenizer(), **options)
    )


@pytest.fixture
def proxy(closing):
    """Start a proxy before an address."""
    return lambda url: closing(FaultProxy(url))


@pytest.fixture
def remote(closing):
    """A teacher that does not wait long."""

    def make(urls, **options):
        return closing(RemoteTeacher(urls, **{"retry_wait": 0.01, "max_retry_wait": 0.05, "timeout": 20.0, **options}))

    return make
