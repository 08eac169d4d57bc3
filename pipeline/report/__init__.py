"""`OUT/report/index.html`: what is in a dataset, what is not, and why, on one page that needs no network."""

from pipeline.report.page import REPORT_FILE, ReportConfig, report_command, write_report

__all__ = ["REPORT_FILE", "ReportConfig", "report_command", "write_report"]
