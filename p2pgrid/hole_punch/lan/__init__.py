"""Have the guests of one job share an Ethernet segment, wherever they run and whatever stands between.

    guest ── QEMU ──socket pair── node's switch ══ link ══ node's switch ──socket pair── QEMU ── guest

Each node is a switch for its own guests (`port.py`), and switches are joined by links, each with each
(`lan.py`).  Nobody needs root, and no frame ever reaches a network card of the owner's.

    segment.py   who has which address, by his place in the job (pure)
    switch.py    where each frame goes (pure)
    dhcp.py, names.py, over packets.py: what the switch answers itself (pure)
    messages.py  what switches tell each other on a link (pure)
"""
