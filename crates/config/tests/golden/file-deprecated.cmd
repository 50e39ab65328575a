# A file for an older version: boot ROM keys below lpc. They are carried over with a warning.
bhyve -k tests/golden/deprecated.cfg
