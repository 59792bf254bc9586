"""hostler usage: billing-grade metering from a cloud's notifications."""
