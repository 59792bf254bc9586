"""Topics of the hub: the addresses of feeds."""

from urllib.parse import urlsplit

from hostler_usage.feeds.feed import Feed, feed_at


def topic_feed(topic: str) -> tuple[str, Feed] | None:
    """The address of the service and its feed that a topic names; None where it names none.

    The service may be served below a path of its own.
    """
    parts = urlsplit(topic)
    if parts.query or parts.fragment or not parts.netloc:
        return None
    for mark in ("/feeds/", "/yagi/"):
        prefix, found, rest = parts.path.partition(mark)
        if found and (feed := feed_at(mark + rest)) is not None:
            return f"{parts.scheme}://{parts.netloc}{prefix}", feed
    return None
