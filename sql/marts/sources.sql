-- The sources of the corpus, and how many features fire most in each.
--
-- Grain:   one row per source with tokens, the largest first; one without a name for documents that have no source.
-- Reads:   stg_document_places, stg_summaries
-- Units:   n_documents and n_tokens count documents that have tokens and are not hidden; share is the
--          source's share of all these tokens. n_features counts the features that have most of their tokens in the
--          source (main_source of find_features).
-- Ask it:  what is the corpus made of?
create or replace view sources as
with sizes as (
    select
        places.source,
        count(*)                                    as n_documents,
        sum(end_token_id - first_token_id)::bigint  as n_tokens
    from stg_document_places as places
    group by places.source
),
mains as (
    select main_source, count(*) as n_features from stg_summaries where main_source is not null group by main_source
)
select
    sizes.source,
    n_documents,
    n_tokens,
    n_tokens / sum(n_tokens) over () as share,
    coalesce(n_features, 0)          as n_features
from sizes
left join mains on main_source = sizes.source
order by n_tokens desc, sizes.source;
