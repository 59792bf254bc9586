"""TLS between peers, as an option: both sides show a certificate of the cloud's own authority.

Without it pieces travel in clear. They are public to whoever holds a swarm's token, and no byte is
believed that the manifest does not vouch for, so what TLS adds is that nobody on the network reads
them or the token. It costs `sendfile`: what is encrypted passes through the process on its way out
(benchmarks/precache_cost.py measures how much CPU a GiB then takes).
"""

import ssl
from dataclasses import dataclass
from pathlib import Path

from hostler_common.settings import SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """The two sides of a peer: who it is and whom it trusts."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def load(certificate: Path | None, key: Path | None, authority: Path | None) -> Tls | None:
    """The contexts of a peer, from files in PEM; None where none is named.

    Args:
        certificate: its certificate, valid for the name in its URL, and what is above it.
        key: the private key, without a passphrase.
        authority: who signs the certificates of peers.

    Raises:
        SettingsError: only some are named, or one of them cannot be used.
    """
    files = (certificate, key, authority)
    if not any(files):
        return None
    if certificate is None or key is None or authority is None:
        raise SettingsError("HOSTLER_PRECACHE_PEER_{CERTIFICATE,KEY,CA}_FILE: all three, or none")
    try:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for context in (server, client):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(certificate, key)
            context.load_verify_locations(authority)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as exc:  # ssl.SSLError is one
        names = ", ".join(str(file) for file in files)
        raise SettingsError(f"one of {names}: {exc.strerror or exc}") from exc
    return Tls(server=server, client=client)
