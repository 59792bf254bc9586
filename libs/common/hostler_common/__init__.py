"""What the hostler services share: bus, outbox, database, HTTP, auth, runtime, agent."""
