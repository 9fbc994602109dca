"""Bulk work that survives being killed: an append-only log that a later run goes on with."""

from sparing.jobs.append_log import AppendLog, LogInUse, LogMismatch, read_log

__all__ = ["AppendLog", "LogInUse", "LogMismatch", "read_log"]
