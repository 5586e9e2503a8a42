"""Disks that refuse."""

import os


def refusing(number: int):
    def refuse(*arguments, **_):
        raise OSError(number, os.strerror(number), str(arguments[0]))

    return refuse
