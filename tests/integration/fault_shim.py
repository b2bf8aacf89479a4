"""Sets the clock of programs and slows their disk down; see tests/faults/fault_shim.cc."""

import struct

import programs


class Faults:
    def __init__(self, folder):
        self.file = folder / "faults"
        self.file.write_bytes(bytes(16))
        self.env = {"LD_PRELOAD": str(programs.BIN_DIR / "fault_shim.so"), "SIMPO_FAULT_FILE": str(self.file)}

    def set(self, clock_ahead_s=0, sync_s=0):
        with self.file.open("r+b") as file:
            file.write(struct.pack("qq", int(clock_ahead_s * 1000), int(sync_s * 1000)))
