"""The key goes to the servers and nowhere else; TLS is checked."""

import io
import logging
import ssl
import traceback
import warnings

import pytest
import trustme
from asking import assert_true_scores, make_batch

from trl_opd.teachers import RemoteTeacher, TeacherScoreError

KEY = "sk-marker-7f3a9c"


@pytest.fixture
def key(monkeypatch):
    """In the environment alone: a test's own local variables are in its tracebacks."""
    monkeypatch.setenv("TEACHER_KEY", KEY)


@pytest.fixture
def everything(caplog, capfd):
    """All that a run writes: logs of all loggers at their lowest level, and what is printed."""
    caplog.set_level(logging.DEBUG)
    stream = io.StringIO()
    yield lambda: caplog.text + stream.getvalue() + "".join(capfd.readouterr())


def with_locals(error):
    """A traceback as detailed as tools print it: with the local variables of every frame, and all causes."""
    return "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())


def test_the_key_is_sent(serve, remote, served_model, key):
    server, batch = serve(key=KEY), make_batch()
    teacher = remote(server.url, api_key_env="TEACHER_KEY")
    assert_true_scores(teacher(batch), batch, served_model)
    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in server.headers)


def test_without_a_key_none_is_sent(serve, remote, key):
    server = serve()
    remote(server.url)(make_batch())
    assert not any("authorization" in headers for headers in server.headers)


@pytest.mark.parametrize("fault", [None, "500", "truncated", "hang", "other model", "a web page", "drop"])
def test_the_key_is_nowhere_to_be_seen(serve, proxy, remote, key, everything, fault):
    between = proxy(serve(key=KEY).url)
    between.always = fault
    teacher = remote(between.url, api_key_env="TEACHER_KEY", retries=1, timeout=0.5)
    seen = [repr(teacher), str(vars(teacher)), str(vars(teacher.client)), teacher.name]
    seen += [str(finding) for finding in teacher.check(support_size=5)]
    try:
        teacher(make_batch())
        assert fault is None
    except TeacherScoreError as error:
        seen.append(with_locals(error))
    text = "".join(seen) + everything()
    assert between.url in text
    assert KEY not in text


def test_a_wrong_key_is_not_shown_even_if_the_server_repeats_it(serve, remote, key, everything):
    teacher = remote(serve(key="another").url, api_key_env="TEACHER_KEY")
    with pytest.raises(
        TeacherScoreError, match=r"HTTP 401.*Bearer \*\*\*.*environment variable TEACHER_KEY"
    ) as caught:
        teacher(make_batch())
    assert KEY not in with_locals(caught.value) + everything()
    assert KEY not in "".join(map(str, teacher.check()))


def test_a_key_that_no_header_can_hold_is_not_shown(serve, remote, monkeypatch, everything):
    monkeypatch.setenv("TEACHER_KEY", f"{KEY}\nschlüssel")
    teacher = remote(serve(key=KEY).url, api_key_env="TEACHER_KEY", retries=0)
    with pytest.raises(TeacherScoreError) as caught:
        teacher(make_batch())
    assert KEY not in with_locals(caught.value) + everything()


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_key_is_noticed_at_once(monkeypatch, value):
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(ValueError, match="'TEACHER_KEY', which is not set"):
        RemoteTeacher("http://127.0.0.1:8000", api_key_env="TEACHER_KEY")


@pytest.mark.parametrize("url", ["http://teacher.example:8000", "http://10.1.2.3", "http://127.0.0.1.example"])
def test_no_key_over_plain_http_to_another_machine(key, url):
    with pytest.raises(ValueError, match=r"must be https for a key.*api_key_over_http=True") as caught:
        RemoteTeacher([url, "https://fine.example"], api_key_env="TEACHER_KEY")
    assert KEY not in str(caught.value)
    RemoteTeacher(url, api_key_env="TEACHER_KEY", api_key_over_http=True)
    RemoteTeacher(url)


@pytest.mark.parametrize(
    "url", ["http://localhost:8000", "http://127.0.0.2", "http://[::1]:80", "https://teacher.example"]
)
def test_a_key_may_go_to_this_machine_and_over_https(key, url):
    RemoteTeacher(url, api_key_env="TEACHER_KEY")


@pytest.mark.parametrize(
    "url", [f"http://user:{KEY}@host", f"https://{KEY}@host", f"https://host/?key={KEY}", f"{KEY}@host"]
)
def test_an_address_with_a_secret_is_refused_without_showing_it(url):
    with pytest.raises(ValueError, match="urls must be") as caught:
        RemoteTeacher(url)
    assert KEY not in str(caught.value)


@pytest.fixture
def authority():
    return trustme.CA()


@pytest.fixture
def tls_server(serve, authority):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return serve(context=context, key=KEY)


def test_tls_with_the_certificate_of_an_authority(tls_server, authority, remote, served_model, key, tmp_path):
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(path)
    batch = make_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher = remote(tls_server.url, api_key_env="TEACHER_KEY", verify=str(path))
        assert_true_scores(teacher(batch), batch, served_model)


def test_a_certificate_that_nobody_trusts_is_refused_before_the_key_is_sent(tls_server, remote, key, tmp_path):
    stranger = tmp_path / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(stranger)
    for verify in (True, str(stranger)):
        teacher = remote(tls_server.url, api_key_env="TEACHER_KEY", verify=verify, retries=1)
        with pytest.raises(TeacherScoreError, match="certificate"):
            teacher(make_batch())
    assert not tls_server.headers


def test_proxies_of_the_environment_are_used_on_request_alone(serve, remote, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    remote(serve().url)(make_batch())
    with pytest.raises(TeacherScoreError, match=r"ConnectError|ProxyError"):
        remote(serve().url, trust_env=True, retries=0)(make_batch())
