-- Usage by project and day is read in this order, a page at a time, however many projects and years there are: the key
-- begins with what pages go on from. What is asked of all projects, and the rebuilding of a day, go by the day.
ALTER TABLE usage_day
    DROP CONSTRAINT usage_day_pkey,
    ADD PRIMARY KEY (project_id, day, region, resource_type, measure);
CREATE INDEX usage_day_day ON usage_day (day);
