"""How one command becomes many processes: `plan` reads options and environment, `agent` starts and watches workers."""
