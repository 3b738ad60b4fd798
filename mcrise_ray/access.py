"""Who may come in: the token that opens a Ray cluster, and the addresses that it may be sent to.

The token is found where Ray finds it, made for this user alone, and never shown. Other secrets are refused
where a job would hold them.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from mcrise_ray.errors import ClusterError, SpecError

_log = logging.getLogger(__name__)
# Networks count tokens and have tokenizers.
_SECRET_NAME = re.compile(
    r"token(?!s$|i[sz]e)|secret|password|passwd|credential|api_?key|access_?key", re.IGNORECASE
)


def token_path() -> Path:
    """The file that Ray reads: that of `RAY_AUTH_TOKEN_PATH`, or `~/.ray/auth_token`."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(given) if given else Path.home() / ".ray" / "auth_token"


def find_token() -> str | None:
    """The token of this user, from `RAY_AUTH_TOKEN` or from its file; None where there is none.

    A file of this user's that others may read is narrowed to 0600, with a warning: Ray itself writes it as
    the umask says.

    Raises:
        ClusterError: there is a file, but no token can be read from it.
    """
    given = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if given:
        return given
    path = token_path()
    if not path.exists():
        if "RAY_AUTH_TOKEN_PATH" in os.environ:
            raise ClusterError(f"expected a token in {path}, found no such file; check RAY_AUTH_TOKEN_PATH")
        return None
    try:
        _narrow(path)
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"cannot read the token in {path}: {type(error).__name__}") from error
    if not token:
        raise ClusterError(f"expected a token in {path}, found an empty file; remove it, then: mcrise token")
    return token


def ensure_token() -> tuple[Path, bool]:
    """The file of the token, and whether it was made just now; only this user can read it.

    Raises:
        ClusterError: it cannot be made, or is there and useless.
    """
    path = token_path()
    if path.exists():
        find_token()
        _narrow(path)
        return path, False
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The mode is set as the file comes into being: there is no moment at which others could read it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        return ensure_token()
    except OSError as error:
        raise ClusterError(f"cannot make a token in {path}: {error.strerror}") from error
    return path, True


def token_for(address: str, *, insecure: bool = False) -> str | None:
    """The token to send to an address: a URL, or `HOST:PORT`.

    Args:
        address: of a cluster.
        insecure: go without a token, or with one in the clear, even to another machine.

    Raises:
        ClusterError: the address is of another machine, and there is no token for it.
    """
    token = find_token()
    if insecure or is_loopback(address):
        return token
    if token is None:
        raise ClusterError(
            f"expected a token for {address}, which is another machine, found none in {token_path()}; put "
            "the cluster's there (mode 0600), or set RAY_AUTH_TOKEN; --insecure goes without"
        )
    if not address.startswith("https://"):
        _log.warning(
            "the token travels to %s in the clear; better a tunnel (ssh -L, kubectl port-forward) or https",
            address,
        )
    return token


def is_loopback(address: str) -> bool:
    """Whether an address is of this machine, and of no other."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _narrow(path: Path) -> None:
    """Take the rights of others away from a file, or say that they have them."""
    status = path.stat()
    if not stat.S_IMODE(status.st_mode) & 0o077:
        return
    if status.st_uid != os.getuid():
        _log.warning("others may read the token in %s, which belongs to another user", path)
        return
    path.chmod(0o600)
    _log.warning(
        "others could read the token in %s until now; if this machine has other users, remove it and make a "
        "new one with: mcrise token",
        path,
    )


def refuse_secrets(values: Mapping[str, Any]) -> None:
    """Raise `SpecError` where a job holds a secret: jobs are shown, logged and stored with their results."""
    for where, value in _leaves(values):
        secret = _secret_in_url(value) if isinstance(value, str) and "://" in value else None
        # The name alone, because the value must not be shown.
        name = where.rpartition(".")[2]
        if where.startswith("model.args.") and names_secret(name) and isinstance(value, str):
            secret = "a value"
        if secret is not None:
            raise SpecError(
                f"{where}: expected no secrets, because a job is stored with its results, found {secret}; "
                "set it as an environment variable, or in a file of credentials, where the workers run"
            )


def names_secret(name: str) -> bool:
    """Whether a value of this name is likely to be one that nobody else may see."""
    return _SECRET_NAME.search(name) is not None


def _leaves(values: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _leaves(value, f"{where}.{name}" if where else str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _leaves(value, where)
    else:
        yield where, values


def _secret_in_url(url: str) -> str | None:
    parts = urlsplit(url.removeprefix("imagefolder:"))
    if "@" in parts.netloc:
        return "a user or a key in front of the host of a URL"
    name = next((name for name, _ in parse_qsl(parts.query) if names_secret(name)), None)
    return None if name is None else f"the option {name} of a URL"
