-- The store's runs, with the fields of their records.
--
-- Grain:   one row per run of the store, damaged ones too.
-- Reads:   src_runs
-- Units:   facts and quality are JSON. tokens_artefact names the tokens that were encoded. problem says why a run
--          cannot be read, and is null if it can. is_whole is true if all stored tokens are encoded.
--          n_bytes and written are those of the values. place counts from 0, the newest run first.
-- Ask it:  which runs cannot be read, and why?
create or replace view stg_runs as
select
    place::bigint               as place,
    name::varchar               as name,
    fp::varchar                 as fp,
    schema_name::varchar        as schema_name,
    is_current::boolean         as is_current,
    n_tokens::bigint            as n_tokens,
    is_whole::boolean           as is_whole,
    model::varchar              as model,
    n_bytes::bigint             as n_bytes,
    make_timestamp((written::double * 1e6)::bigint) as written,
    tokens_artefact::varchar    as tokens_artefact,
    try_cast(facts as json)     as facts,
    try_cast(quality as json)   as quality,
    problem::varchar            as problem
from src_runs;
