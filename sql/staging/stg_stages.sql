-- The artefacts that the run was made from, as their records describe them.
--
-- Grain:   one row per artefact, in the order of the stages.
-- Reads:   src_stages
-- Units:   see the question stages.
-- Ask it:  which stages was the run made by?
create or replace view stg_stages as
select
    stage::varchar                                  as stage,
    artefact::varchar                               as artefact,
    n_bytes::bigint                                 as n_bytes,
    seconds::double                                 as seconds,
    make_timestamp((written::double * 1e6)::bigint) as written,
    host::varchar                                   as host
from src_stages;
