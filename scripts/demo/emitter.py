"""Send notifications with a real oslo.messaging Notifier: `emitter.py TRANSPORT_URL OPTIONS < plan`.

Each line of the plan is one notification as JSON: driver (messaging or messagingv2), exchange, topic,
event_type, publisher_id, priority, timestamp, payload. OPTIONS is a JSON object of options of
oslo_messaging_rabbit. The clock of oslo.utils is set to each timestamp, so that a day can be told in
seconds. A process of its own, since oslo.messaging brings threads and clocks of its own.
"""

import json
import sys
from datetime import datetime

import oslo_messaging
from oslo_config import cfg
from oslo_utils import timeutils


def transport(url: str, exchange: str, options: dict[str, object]) -> oslo_messaging.Transport:
    """A notification transport whose control exchange is `exchange`."""
    oslo_messaging.set_transport_defaults(control_exchange=exchange)
    conf = cfg.ConfigOpts()
    conf([])
    made = oslo_messaging.get_notification_transport(conf, url=url)
    for name, value in options.items():
        conf.set_override(name, value, group="oslo_messaging_rabbit")
    return made


def main() -> None:
    """Send the plan on standard input, in its order."""
    scheme, _, rest = sys.argv[1].partition("://")
    url, options = f"rabbit://{rest}", {"ssl": scheme == "amqps", **json.loads(sys.argv[2])}
    transports: dict[str, oslo_messaging.Transport] = {}
    notifiers: dict[tuple[str, ...], oslo_messaging.Notifier] = {}
    for line in sys.stdin:
        item = json.loads(line)
        exchange = item["exchange"]
        if exchange not in transports:
            transports[exchange] = transport(url, exchange, options)
        key = (exchange, item["driver"], item["topic"], item["publisher_id"])
        if key not in notifiers:
            notifiers[key] = oslo_messaging.Notifier(
                transports[exchange],
                publisher_id=item["publisher_id"],
                driver=item["driver"],
                topics=[item["topic"]],
                retry=3,
            )
        moment = datetime.fromisoformat(item["timestamp"]).replace(tzinfo=None)
        timeutils.set_time_override(moment)
        send = getattr(notifiers[key], item["priority"].lower())
        send({}, item["event_type"], item["payload"])
        timeutils.clear_time_override()
    for made in transports.values():
        made.cleanup()


if __name__ == "__main__":
    main()
