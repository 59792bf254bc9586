"""Nova's own files say where its images are; what they leave out is as Nova has it."""

from pathlib import Path

import pytest

from hostler_precache.placing import nova_conf
from hostler_precache.placing.nova_conf import NovaConf, NovaConfError


def read(tmp_path: Path, *texts: str) -> NovaConf:
    files = []
    for number, text in enumerate(texts):
        file = tmp_path / f"{number}.conf"
        file.write_text(text)
        files.append(file)
    return nova_conf.read(files)


def test_an_empty_file_means_novas_own_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "") == NovaConf(images_type="qcow2")


def test_what_concerns_the_cache_is_read(tmp_path: Path) -> None:
    conf = read(
        tmp_path,
        """
        [DEFAULT]
        state_path = /srv/nova
        instances_path = ${state_path}/guests
        my_ip: 10.0.0.7
        force_raw_images = no
        log_format = %(asctime)s $not here
        compute_driver = libvirt.LibvirtDriver
        [image_cache]
        subdirectory_name = _base_$my_ip
        remove_unused_base_images = False
        remove_unused_original_minimum_age_seconds = 3600
        manager_interval=600
        [libvirt]
        images_type = lvm
        """.replace("        ", ""),
    )

    assert conf == NovaConf(
        instances_path=Path("/srv/nova/guests"),
        base_directory=Path("/srv/nova/guests/_base_10.0.0.7"),
        compute_driver="libvirt.LibvirtDriver",
        images_type="lvm",
        force_raw_images=False,
        removes_unused=False,
        original_age_seconds=3600.0,
        manager_interval_seconds=600.0,
    )


def test_later_files_and_later_lines_win(tmp_path: Path) -> None:
    conf = read(
        tmp_path,
        "[DEFAULT]\ninstances_path=/a\ninstances_path=/b\n",
        "[DEFAULT]\ninstances_path=/c\n[libvirt]\nimages_type=raw\n",
    )

    assert (conf.instances_path, conf.images_type) == (Path("/c"), "raw")


def test_a_directory_stands_for_its_conf_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "20.conf").write_text("[DEFAULT]\ninstances_path=/last\n")
    (tmp_path / "10.conf").write_text("[DEFAULT]\ninstances_path=/first\n")
    (tmp_path / "99.conf.bak").write_text("[DEFAULT]\ninstances_path=/never\n")

    assert nova_conf.read([tmp_path]).instances_path == Path("/last")


def test_without_images_type_use_cow_images_decides(tmp_path: Path) -> None:
    assert read(tmp_path, "[DEFAULT]\nuse_cow_images=false\n").images_type == "raw"


def test_the_names_that_options_had_once_are_still_taken(tmp_path: Path) -> None:
    conf = read(
        tmp_path,
        "[DEFAULT]\nimage_cache_subdirectory_name=_old\nimage_cache_manager_interval=60\n",
    )

    assert conf.base_directory.name == "_old"
    assert conf.manager_interval_seconds == 60.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[DEFAULT]\nforce_raw_images=maybe\n", "[DEFAULT]force_raw_images"),
        ("[image_cache]\nmanager_interval=soon\n", "[image_cache]manager_interval"),
        ("[image_cache]\nsubdirectory_name=../x\n", "subdirectory_name"),
        ("[image_cache]\nsubdirectory_name=_base_$my_ip\n", "$my_ip"),
        ("[image_cache]\nsubdirectory_name=_b${DEFAULT.my_ip}\n", "${DEFAULT.my_ip}"),
        ("[DEFAULT]\ninstances_path=here\n", "not a full path"),
        ("[DEFAULT]\nstate_path=$a\na=$b\nb=$a\n", "refers to itself"),
        ("instances_path=/a\n", "no section"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(NovaConfError) as caught:
        read(tmp_path, text)

    assert said in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NovaConfError, match=r"absent\.conf"):
        nova_conf.read([tmp_path / "absent.conf"])
