"""Who came again, without and with a cookie, and how many there were."""
