"""Names, forms, locks and users of files as Nova, Ironic and a plain directory have them."""

import contextlib
import fcntl
import hashlib
import os
import struct
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hostler_common.settings import SettingsError
from hostler_precache.placing import backing, nova_lock, ownership, placement, placers
from hostler_precache.placing.ironic_placer import FetchingError, IronicPlacer
from hostler_precache.placing.nova_conf import NovaConf
from hostler_precache.placing.nova_placer import NovaPlacer
from hostler_precache.placing.ownership import NotPermittedError
from hostler_precache.placing.placement import UnsupportedError, UsersUnknownError, Wanted
from hostler_precache.settings import AgentSettings
from hostler_precache.transfer.manifest import BlobId, ImageId

IMAGE = ImageId("155d900f-4e14-4e4c-a73d-069cbf4541e6")
NOBODY = 65534
SHA1 = "e60a8dbab0ca4e8a5ae7d4fbda8bd5bd3b2ffd2a"


def wanted(image_id: str = IMAGE, disk_format: str | None = "raw") -> Wanted:
    return Wanted(
        image_id=ImageId(image_id), blob_id=BlobId(str(uuid.uuid4())), disk_format=disk_format
    )


def nova(instances: Path, **options: object) -> NovaPlacer:
    conf = NovaConf(instances_path=instances, base_directory=instances / "_base", **options)  # type: ignore[arg-type]
    return NovaPlacer(conf)


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


# --- which image goes where


@pytest.mark.parametrize("images_type", ["qcow2", "raw", "flat", "lvm"])
def test_nova_finds_a_base_by_the_sha1_of_the_image_id(tmp_path: Path, images_type: str) -> None:
    target = nova(tmp_path, images_type=images_type).target(wanted())

    assert target == tmp_path / "_base" / hashlib.sha1(IMAGE.encode()).hexdigest()


@pytest.mark.parametrize(
    ("options", "disk_format", "reason"),
    [
        ({"images_type": "rbd"}, "raw", "nova.images_type: rbd"),
        ({"images_type": "ploop"}, "raw", "nova.images_type: ploop"),
        ({"compute_driver": "ironic.IronicDriver"}, "raw", "nova.compute_driver"),
        ({"images_type": "qcow2"}, "qcow2", "image.not_raw: it is qcow2"),
        ({"images_type": "qcow2"}, "vmdk", "image.not_raw: it is vmdk"),
    ],
)
def test_where_nova_would_not_read_the_file_the_answer_is_unsupported_with_the_reason(
    tmp_path: Path, options: dict[str, object], disk_format: str, reason: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        nova(tmp_path, **options).target(wanted(disk_format=disk_format))

    assert str(caught.value).startswith(reason)


def test_nova_that_does_not_force_raw_takes_any_format(tmp_path: Path) -> None:
    placer = nova(tmp_path, images_type="qcow2", force_raw_images=False)

    assert placer.target(wanted(disk_format="qcow2")).parent == tmp_path / "_base"
    assert not placer.is_raw_only


def test_ironic_names_a_file_by_its_uuid_and_whether_it_was_made_raw(tmp_path: Path) -> None:
    raw, any_format = (IronicPlacer(tmp_path, force_raw=force) for force in (True, False))

    assert raw.target(wanted()) == tmp_path / f"{IMAGE}.converted"
    assert any_format.target(wanted(disk_format="qcow2")) == tmp_path / IMAGE
    with pytest.raises(UnsupportedError, match=r"image\.not_raw"):
        raw.target(wanted(disk_format="qcow2"))
    with pytest.raises(UnsupportedError, match=r"ironic\.name"):
        raw.target(wanted("debian-13"))


@pytest.mark.parametrize("disk_format", ["qcow2", "qed", "vmdk", "vhdx", "vpc", "vdi"])
def test_what_qemu_makes_of_a_format_is_not_taken_for_raw(
    tmp_path: Path, disk_format: str
) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-f", disk_format, path, "4M")
    named = {"vpc": "vhd"}.get(disk_format, disk_format)

    with path.open("rb") as file:
        assert placement.foreign_format(file.read(placement.HEAD_BYTES)) == named


@given(st.binary(max_size=600))
@example(b"")
def test_a_boot_sector_is_raw(head: bytes) -> None:
    assert placement.foreign_format(b"\xeb\x63\x90" + head) is None


# --- what the settings make


def agent_settings(**values: object) -> AgentSettings:
    return AgentSettings(amqp_url="amqp://x", precache_url="http://x", **values)  # type: ignore[arg-type]


def test_novas_own_files_say_where_and_how(tmp_path: Path) -> None:
    conf = tmp_path / "nova.conf"
    conf.write_text(
        f"[DEFAULT]\ninstances_path={tmp_path}/i\n[image_cache]\nsubdirectory_name=_b\n"
        "remove_unused_original_minimum_age_seconds=600\n"
    )

    placer = placers.nova(agent_settings(nova_config_files=[str(conf)]))

    assert placer.directory == tmp_path / "i" / "_b"
    assert placer.cleaner_age_seconds == 600.0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"target_template": "{image_id}"}, "HOSTLER_PRECACHE_TARGET_TEMPLATE"),
        ({"nova_config_files": ["/absent/nova.conf"]}, "HOSTLER_PRECACHE_NOVA_CONFIG_FILES"),
    ],
)
def test_settings_that_make_no_placer_are_named(values: dict[str, object], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        placers.nova(agent_settings(**values))


def test_a_directory_other_than_novas_own_is_refused(tmp_path: Path) -> None:
    conf = tmp_path / "nova.conf"
    conf.write_text("[DEFAULT]\ninstances_path=/i\n")

    with pytest.raises(SettingsError, match=r"says /i/_base"):
        placers.nova(agent_settings(nova_config_files=[str(conf)], target_dir=tmp_path))


def test_placers_are_found_by_their_entry_points(tmp_path: Path) -> None:
    for name in ("nova", "directory", "ironic"):
        placer = placers.build(agent_settings(placer=name, target_dir=tmp_path))
        assert placer.directory == tmp_path
    with pytest.raises(SettingsError, match="there are: directory, ironic, nova"):
        placers.build(agent_settings(placer="vmware"))


# --- Nova's lock

_HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_while_another_process_holds_the_lock_ours_is_refused_and_had_after(
    tmp_path: Path,
) -> None:
    locks = tmp_path / "locks"
    locks.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(locks / f"nova-{SHA1}")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(nova_lock.LockedError, match="Nova holds"),
            nova_lock.held(locks, SHA1, patience_seconds=0.0),
        ):
            pass
    finally:
        holder.communicate()
    with nova_lock.held(locks, SHA1, patience_seconds=0.0):
        assert (locks / f"nova-{SHA1}").exists()


def test_a_lock_whose_file_nova_deleted_meanwhile_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / f"nova-{SHA1}"
    rounds: list[int] = []
    real = fcntl.lockf

    def lockf(fd: int, operation: int) -> None:
        real(fd, operation)
        if not rounds:  # Nova's cleaner was done with the base between our open and our lock
            path.unlink()
        rounds.append(fd)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fcntl, "lockf", lockf)
        with nova_lock.held(tmp_path, SHA1, patience_seconds=0.0):
            assert len(rounds) == 2
            assert path.exists()


def test_the_lock_is_made_for_whoever_owns_the_instances(tmp_path: Path) -> None:
    instances = tmp_path / "instances"
    instances.mkdir()
    os.chown(instances, NOBODY, NOBODY)

    with nova_lock.held(instances / "locks", SHA1, patience_seconds=0.0):
        for path in (instances / "locks", instances / "locks" / f"nova-{SHA1}"):
            assert (path.stat().st_uid, path.stat().st_gid) == (NOBODY, NOBODY)


# --- whose the place is


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A directory that every user can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@contextlib.contextmanager
def acting_as_nobody() -> Iterator[None]:
    """As a user who owns nothing, as far as the kernel is concerned."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_place_of_another_user_is_refused_with_what_to_do(public_path: Path) -> None:
    public_path.chmod(0o777)
    with (
        acting_as_nobody(),
        pytest.raises(NotPermittedError, match=r"belongs to user 0 .* run it as that user"),
    ):
        ownership.check_permitted(public_path / "not" / "yet")


def test_a_place_that_its_own_user_may_not_write_to_is_refused(public_path: Path) -> None:
    os.chown(public_path, NOBODY, NOBODY)
    public_path.chmod(0o555)
    with acting_as_nobody(), pytest.raises(NotPermittedError, match="may not be written to"):
        ownership.check_permitted(public_path)


# --- who uses a base


def test_a_base_is_in_use_by_every_kind_of_disk_that_stands_on_it(tmp_path: Path) -> None:
    base = tmp_path / "_base"
    base.mkdir()
    names = [f"{number:040x}" for number in range(5)]
    for name in names:
        qemu_img("create", "-f", "raw", base / name, "1M")
    disks = {
        names[0]: tmp_path / "11111111-uuid" / "disk",
        names[1]: tmp_path / "22222222-uuid_resize" / "disk.local",
        names[2]: tmp_path / "snapshots" / "tmpx" / "33333333.delta",
    }
    for name, disk in disks.items():
        disk.parent.mkdir(parents=True)
        qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", base / name, disk)
    flat = tmp_path / "44444444-uuid" / "disk"
    flat.parent.mkdir()
    qemu_img("convert", "-O", "raw", base / names[3], flat)
    placer = nova(tmp_path)

    used = placer.in_use([base / name for name in names], own_links=2)

    assert used == {base / name for name in disks}


def test_a_disk_that_cannot_be_read_means_that_users_are_unknown(public_path: Path) -> None:
    disk = public_path / "11111111-uuid" / "disk"
    disk.parent.mkdir()
    disk.write_bytes(b"QFI\xfb")
    disk.chmod(0)
    with acting_as_nobody(), pytest.raises(UsersUnknownError, match="Permission denied"):
        nova(public_path).in_use([public_path / "_base" / SHA1], own_links=1)


@given(
    offset=st.integers(0, 2**64 - 1), length=st.integers(0, 2**32 - 1), tail=st.binary(max_size=64)
)
def test_a_header_that_a_guest_made_up_ends_nothing(
    tmp_path_factory: pytest.TempPathFactory, offset: int, length: int, tail: bytes
) -> None:
    disk = tmp_path_factory.getbasetemp() / "made-up"
    disk.write_bytes(struct.pack(">4sIQI", b"QFI\xfb", 3, offset, length) + tail)

    name = backing.backing_name(disk)

    assert name is None or len(name) <= 1023


def test_ironic_uses_what_a_deployment_has_linked(tmp_path: Path) -> None:
    placer = IronicPlacer(tmp_path, force_raw=True)
    deployed, idle = tmp_path / "a.converted", tmp_path / "b.converted"
    for path in (deployed, idle):
        path.touch()
        (tmp_path / f"{path.name}.kept").hardlink_to(path)
    (tmp_path / "node-1-disk").hardlink_to(deployed)

    assert placer.in_use([deployed, idle], own_links=2) == {deployed}


@pytest.mark.parametrize("content", [[], ["{name}"], ["{name}.part"]])
def test_while_ironic_may_be_fetching_the_image_we_stay_away(
    tmp_path: Path, content: list[str]
) -> None:
    placer = IronicPlacer(tmp_path, force_raw=True)
    target = placer.target(wanted())
    folder = tmp_path / "tmpab12_cd8"
    folder.mkdir()
    for name in content:
        (folder / name.format(name=target.name)).touch()

    with (
        pytest.raises(FetchingError, match="Ironic is fetching"),
        placer.exclusively(target, patience_seconds=0.0),
    ):
        pass


def test_what_else_ironic_fetches_is_no_reason_to_wait(tmp_path: Path) -> None:
    placer = IronicPlacer(tmp_path, force_raw=True)
    (tmp_path / "tmpab12_cd8").mkdir()
    (tmp_path / "tmpab12_cd8" / "other.converted.part").touch()

    with placer.exclusively(placer.target(wanted()), patience_seconds=0.0):
        pass
