-- What the store holds and how good it is.
--
-- Grain:   one row per run of the store, damaged ones too.
-- Reads:   stg_runs
-- Units:   l0 is features per token, k what was asked for (null where nothing was); variance_unexplained, dead_share
--          and loss_recovered_… are shares; quality holds every measure as JSON. Null until the run is
--          evaluated.
-- Ask it:  which run recovers most of the loss at which l0?
create or replace view runs as
select
    name,
    schema_name,
    fp,
    is_current,
    facts ->> 'site'                                     as site,
    facts ->> 'architecture'                             as architecture,
    (facts ->> 'n_features')::bigint                     as n_features,
    (facts ->> 'k')::bigint                              as k,
    n_tokens,
    (quality ->> 'l0')::double                           as l0,
    (quality ->> 'variance_unexplained')::double         as variance_unexplained,
    (quality ->> 'dead_share')::double                   as dead_share,
    (quality ->> 'loss_recovered_zero')::double          as loss_recovered_zero,
    (quality ->> 'loss_recovered_mean')::double          as loss_recovered_mean,
    quality,
    problem
from stg_runs;
