"""Workers brought together: in one process (``local``, without Ray) and as Ray Serve applications (the rest)."""
