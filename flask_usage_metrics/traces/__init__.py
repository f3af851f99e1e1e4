"""OpenTelemetry spans of requests: started live, ended from records, replayed from storages."""
