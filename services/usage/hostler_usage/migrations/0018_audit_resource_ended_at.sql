-- The index for those that had ended, or had not, at some moment began with region and type. While the table has no
-- statistics yet, as in the first backlog of all, the planner took it for one as good as the key, and a fold read every
-- resource of the type for each that it looked for.
DROP INDEX audit_resource_ended_at;
CREATE INDEX audit_resource_ended_at ON audit_resource (ended_at, region, resource_type);
