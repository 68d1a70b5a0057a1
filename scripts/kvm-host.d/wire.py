"""What host.py and agent.py agree on: control messages are lines of JSON; the streams are bare bytes.

A stream's end is told on the control port, as the number of its bytes: no byte can be lost behind it.
"""

import json

PORTS = ("control", "stdin", "stdout", "stderr")


class Lines:
    """Cuts what comes from a control port into messages."""

    def __init__(self):
        self.rest = b""

    def feed(self, data):
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines if line]


def message(**fields):
    return json.dumps(fields).encode() + b"\n"
