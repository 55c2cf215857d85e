-- The settings of the run and facts of its stages, as their records have them.
--
-- Grain:   one row per setting or fact.
-- Reads:   src_settings
-- Units:   see the question settings.
-- Ask it:  which settings does the record hold?
create or replace view stg_settings as
select * from src_settings;
