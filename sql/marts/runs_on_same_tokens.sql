-- How the run compares with the other runs on the same tokens: features per token against the variance they miss.
--
-- Grain:   one row per readable run that encodes the tokens of this run, this run too, by l0.
-- Reads:   stg_runs
-- Units:   is_current is true for the run that is asked. l0 is the number of features per token; variance_unexplained
--          and dead_share are shares. All three are null until the run is evaluated.
-- Ask it:  does another run explain more with fewer features?
create or replace view runs_on_same_tokens as
select
    schema_name,
    is_current,
    facts ->> 'architecture'                         as architecture,
    (facts ->> 'n_features')::bigint                 as n_features,
    (quality ->> 'l0')::double                       as l0,
    (quality ->> 'variance_unexplained')::double     as variance_unexplained,
    (quality ->> 'dead_share')::double               as dead_share
from stg_runs
where problem is null
    and tokens_artefact = (select any_value(tokens_artefact) from stg_runs where is_current)
order by l0, schema_name;
