"""From settings to what plugins are built with: where the cloud's services are, and who we are to them."""

from pathlib import Path
from typing import Final, TypeVar

import aiohttp

from hostler_common import settings as common_settings
from hostler_precache.settings import Settings, read_secret
from hostler_precache.sources.access import TempAuth
from hostler_precache.sources.keystone import ApplicationCredential, Keystone, Password
from hostler_precache.sources.plugins import Surroundings

ValueT = TypeVar("ValueT")

_PREFIX: Final = f"HOSTLER_{Settings.service.upper()}_"


def surroundings(settings: Settings, session: aiohttp.ClientSession) -> Surroundings:
    """What the settings say, with the secrets that their files hold.

    Raises:
        SettingsError: a setting that another one needs is missing, or a secret cannot be read.
    """
    return Surroundings(
        session=session,
        glance_url=settings.glance_url,
        glance_token=read_secret(settings.glance_token_file),
        keystone=_keystone(settings, session),
        swift_tempauth=_tempauth(settings, session),
        usage_url=settings.usage_url,
        usage_token=common_settings.read_token(settings),
        file_roots=[Path(root) for root in settings.file_roots],
    )


def _keystone(settings: Settings, session: aiohttp.ClientSession) -> Keystone | None:
    if settings.keystone_url is None:
        return None
    secret = _needed(read_secret(settings.keystone_secret_file), "keystone_secret_file")
    credential: ApplicationCredential | Password
    if settings.keystone_application_credential_id is not None:
        if settings.keystone_username is not None:
            raise common_settings.SettingsError(
                f"{_PREFIX}KEYSTONE_USERNAME: is set beside an application credential: set one"
            )
        credential = ApplicationCredential(
            credential_id=settings.keystone_application_credential_id, secret=secret
        )
    elif settings.keystone_username is not None:
        credential = Password(
            username=settings.keystone_username,
            password=secret,
            project=_needed(settings.keystone_project, "keystone_project"),
            user_domain=settings.keystone_user_domain,
            project_domain=settings.keystone_project_domain,
        )
    else:
        raise common_settings.SettingsError(
            f"{_PREFIX}KEYSTONE_APPLICATION_CREDENTIAL_ID: is not set, nor is KEYSTONE_USERNAME"
        )
    return Keystone(
        session,
        settings.keystone_url,
        credential,
        region=settings.keystone_region,
        interface=settings.keystone_interface,
    )


def _tempauth(settings: Settings, session: aiohttp.ClientSession) -> TempAuth | None:
    if settings.swift_auth_url is None:
        return None
    return TempAuth(
        session,
        settings.swift_auth_url,
        user=_needed(settings.swift_user, "swift_user"),
        key=_needed(read_secret(settings.swift_key_file), "swift_key_file"),
    )


def _needed(value: ValueT | None, name: str) -> ValueT:
    if value is None:
        raise common_settings.SettingsError(f"{_PREFIX}{name.upper()}: is not set")
    return value
