"""``make compat``: the drop-in patches against the real libraries, a pinned and the newest version of each."""
