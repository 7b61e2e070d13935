"""Ask the operating system whether this computer runs on battery and whether its network is metered.

Both are asked anew each time, and a system that cannot say is taken for a plugged-in, unmetered one:
a server has no battery, and a container no network service to ask.
"""

from __future__ import annotations

import psutil
from jeepney import DBusAddress, MessageType, Properties
from jeepney.io.blocking import open_dbus_connection

PATIENCE = 2.0
"""Seconds the network service may take to answer."""
METERED = (1, 3)
"""NetworkManager's NM_METERED_YES and NM_METERED_GUESS_YES."""

_NETWORK = DBusAddress(
    "/org/freedesktop/NetworkManager",
    bus_name="org.freedesktop.NetworkManager",
    interface="org.freedesktop.NetworkManager",
)


def on_battery() -> bool:
    """Whether no mains is plugged in."""
    battery = psutil.sensors_battery()
    return battery is not None and battery.power_plugged is False


def on_metered_network(bus: str = "SYSTEM") -> bool:
    """Whether NetworkManager, if there is one, knows or guesses that bytes cost money."""
    try:
        with open_dbus_connection(bus) as connection:
            answer = connection.send_and_get_reply(Properties(_NETWORK).get("Metered"), timeout=PATIENCE)
    except (OSError, KeyError, TimeoutError, ValueError):
        return False  # no bus, or nobody answers there
    if answer.header.message_type is not MessageType.method_return:
        return False
    return answer.body[0][1] in METERED
