"""What an operator may mistype: each is one sentence, and no traceback."""

import pytest

from hostler_common import client, errors


@pytest.mark.parametrize("url", ["http://[::1", "http://a:notaport", "http://\x00"])
async def test_what_is_not_an_address_is_refused_in_words(url: str) -> None:
    with pytest.raises(errors.Invalid, match="is not an address"):
        async with client.open_api(url):
            pass


async def test_a_token_that_could_not_be_a_header_is_refused_in_words() -> None:
    with pytest.raises(errors.Invalid, match="the token has characters"):
        async with client.open_api("http://127.0.0.1", token="tökén"):
            pass
