# bhyvemgr, bmd: a file alone; the name is in it, values are dumped unexpanded.
bhyve -k tests/golden/bhyvemgr.cfg
