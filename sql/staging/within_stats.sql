-- How often and how strongly features fire in a range, and how many tokens it has: stored counts where they are exact,
-- values for the rest.
--
-- Grain:   one row per feature, source and way of counting, if the feature fires; and one per source and way of
--          counting without a feature_id, which counts the encoded tokens. Without sources, source is null or the
--          document's.
-- Reads:   within_documents, stg_document_places, src_feature_stats, src_feature_sources, src_encoded_tokens,
--          stg_tokens, is_encoded, stg_token_major, stg_feature_major, part_folder, peak_value
-- Units:   add the rows up. sums and max_value are in the units of the activations (squared). max_value is the
--          strongest value with its sign: null of a source, which no part stores. features is a list, null means all.
--          The other arguments are those of within_documents.
-- Ask it:  from within_stats(null, null, null, 0, 3, null)
--
-- Values of listed features are read feature by feature, and placed in documents. Those of all features are read token
-- by token. Where the documents of a part to be read follow on one another, the first and last token say which row
-- groups to read, of at most two parts; other documents need a list of their tokens. Where there is nothing to read, a
-- document or token is looked for that does not exist: DuckDB then opens no file. Of an empty list it would read the
-- first rows.
create or replace macro within_stats(sources, since, until, from_part, to_part, features) as table
with chosen as materialized (
    from within_documents(sources, since, until, from_part, to_part)
),
counted as materialized (
    select distinct folder from chosen where is_counted
),
to_read as materialized (
    select
        document_id,
        coalesce(list_position(sources, chosen.source), 0) as place,
        folder,
        first_token_id,
        end_token_id
    from chosen
    where not is_counted
),
longest as (
    select min(first_token_id) as first_id, max(end_token_id) - 1 as last_id, count(*) as n_documents
    from to_read
    where sources is null and features is null
    group by folder
    order by last_id - first_id desc, first_id
    limit 2
),
spans as materialized (
    select first_id, last_id, row_number() over (order by first_id) as number
    from longest
    join stg_document_places as places on places.first_token_id between first_id and last_id
    group by first_id, last_id
    having count(*) = any_value(n_documents)
),
placed as materialized (
    select document_id, place, number is not null as is_in_span
    from to_read
    left join spans on first_token_id between first_id and last_id
    union all
    select -1, 0, unnest([true, false])
),
scattered as materialized (
    select tokens.token_id, place
    from stg_tokens as tokens
    join (from placed where not is_in_span) as mine using (document_id)
    where tokens.mask and is_encoded(tokens.token_id, tokens.vocab_id)
),
n_read as (
    select place, count(*) as n_tokens from scattered group by place
    union all
    select place, count(*) as n_tokens
    from stg_tokens as tokens
    join (from placed where is_in_span) as mine using (document_id)
    where tokens.mask and is_encoded(tokens.token_id, tokens.vocab_id)
    group by place
),
listed as (
    select feature_id, token_id, value
    from stg_feature_major
    where feature_id in (select unnest(case when exists (from to_read) then features::integer[] else [-1] end))
        and low <= list_max(features::bigint[])
        and high >= list_min(features::bigint[])
),
read as (
    select feature_id, 0 as place, value
    from stg_token_major
    where features is null
        and token_id between (select coalesce(min(first_id), -1) from spans where number = 1)
            and (select coalesce(min(last_id), -1) from spans where number = 1)
    union all
    select feature_id, 0 as place, value
    from stg_token_major
    where features is null
        and token_id between (select coalesce(min(first_id), -1) from spans where number = 2)
            and (select coalesce(min(last_id), -1) from spans where number = 2)
    union all
    select feature_id, tokens.place, value
    from stg_token_major
    join (from scattered union all select -1, 0 where not exists (from scattered)) as tokens using (token_id)
    where features is null
    union all
    select feature_id, mine.place, value
    from listed
    asof join stg_document_places as places on listed.token_id >= places.first_token_id
    join to_read as mine on mine.document_id = places.document_id
)
select null as feature_id, encoded.source, n_tokens, null as sum_value, null as sum_squares, null as max_value
from src_encoded_tokens as encoded
where (sources is null or (list_contains(sources, encoded.source) and not is_rest))
    and part_folder(filename) in (from counted)
union all
select null, sources[place], n_tokens, null, null, null
from n_read
union all
select feature_id, null, n_tokens, sum_value, sum_squares, max_value
from src_feature_stats
where sources is null
    and n_tokens > 0
    and (features is null or list_contains(features, feature_id))
    and part_folder(filename) in (from counted)
union all
select feature_id, stored.source, n_tokens, sum_value, sum_squares, null
from src_feature_sources as stored
where list_contains(sources, stored.source)
    and not is_rest
    and (features is null or list_contains(features, feature_id))
    and part_folder(filename) in (from counted)
union all
select
    feature_id,
    sources[place],
    count(*),
    sum(value::double),
    sum(value::double * value::double),
    case when sources is null then peak_value(value)::double end
from read
group by feature_id, place;
