"""What the cloud's own audits say, beside what its notifications say."""
