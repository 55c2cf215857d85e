-- The number of parts of the run. Counts of the nearest of each part are exact if there is one.
--
-- Grain:   one row.
-- Reads:   src_feature_stats
-- Units:   n_parts counts parts; a compacted run has one.
-- Ask it:  is this run compacted?
create or replace view stg_parts as
select count(distinct filename) as n_parts from src_feature_stats;
