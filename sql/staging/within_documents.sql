-- The documents of a range, and whether the stored counts of their parts are those of the range alone.
--
-- Grain:   one row per visible document with tokens that is in the range.
-- Reads:   stg_document_places, stg_part_tokens, stg_shape, src_encoded_tokens, stg_hidden_values, part_folder,
--          filter_date
-- Units:   sources is a list of names; null, here and below, means all. `since` is included, `until` is not; with
--          either, documents without a date are left out. from_part and to_part, both included, are those of
--          stg_part_tokens. folder is that of the run's part; first_token_id and end_token_id are those of
--          stg_document_places. is_counted is true if every document of the part that has one of the sources is in the
--          range, no value of the part is hidden, and the part counts each source apart: then what the part stores is
--          exact for the range.
-- Ask it:  from within_documents(['novels'], '1813', null, null, null)
create or replace macro within_documents(sources, since, until, from_part, to_part) as table
with placed as materialized (
    select
        document_id,
        places.source,
        places.first_token_id,
        places.end_token_id,
        case when places.first_token_id < parts.end_token_id then folder end as folder,
        coalesce(
            (since is null or written >= filter_date('since', since))
            and (until is null or written < filter_date('until', until))
            and (from_part is null or (part >= from_part and places.first_token_id < parts.end_token_id))
            and (to_part is null or (part <= to_part and places.first_token_id < parts.end_token_id)),
            false
        ) as is_in_range
    from stg_document_places as places
    asof left join stg_part_tokens as parts on places.first_token_id >= parts.first_token_id
    where sources is null or list_contains(sources, places.source)
),
counted as (
    select folder
    from placed
    where folder is not null
        and (select has_marginals from stg_shape)
        and folder not in (
            select stale.folder
            from stg_part_tokens as stale
            join stg_hidden_values as unseen
                on stale.first_token_id <= unseen.last_token_id and stale.end_token_id > unseen.first_token_id
        )
        and (sources is null or folder not in (select part_folder(filename) from src_encoded_tokens where is_rest))
    group by folder
    having bool_and(is_in_range)
)
select
    document_id,
    placed.source,
    folder,
    first_token_id,
    end_token_id,
    folder is not null and folder in (from counted) as is_counted
from placed
where is_in_range;
