-- The artefacts that the run was made from, as their records describe them.
--
-- Grain:   one row per artefact, in the order of the stages.
-- Reads:   src_stages
-- Units:   see the question stages; written counts seconds since 1970.
-- Ask it:  which stages was the run made by?
create or replace view stg_stages as
select * from src_stages;
