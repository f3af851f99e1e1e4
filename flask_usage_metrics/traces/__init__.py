"""OpenTelemetry spans of requests: live, from records, and again long after."""
