-- Places at which several features fire within a few tokens of one another, in one document.
--
-- Grain:   one row per token that ends such a group, in corpus order: one of the features fires there, and each of the
--          others fires there or at most `window` tokens before. All are beyond their thresholds.
-- Reads:   threshold_hits, token_owners, token_pieces
-- Units:   features and thresholds are lists of one length, not empty. Beyond means above or, in a signed run and for a
--          threshold below zero, below. token_ids and feature_values are in the order of
--          features: each feature's last hit up to token_id, and its value in the units of the activations. piece and
--          position belong to token_id; span is token_id minus the smallest of token_ids.
-- Parameters: features bigint[], thresholds double[], window bigint
-- Ask it:  where do 12 and 34 fire at most 5 tokens apart?  from tokens_where_within([12, 34], [0, 0], 5)
create or replace macro tokens_where_within(features, thresholds, "window") as table
with hits as materialized (
    from threshold_hits(features, thresholds)
),
owners as materialized (
    from token_owners((select list(distinct token_id) from hits))
),
owned as materialized (
    select hits.place, token_id, hits.value, owners.first_token_id from hits join owners using (token_id)
),
ends as (
    select distinct token_id as last_id, first_token_id, place
    from (select distinct token_id, first_token_id from owned)
    cross join (select unnest(generate_series(1, len(features))) as place)
),
latest as (
    select ends.last_id, ends.place, owned.token_id, owned.value
    from ends
    asof join owned
        on ends.place = owned.place
        and ends.first_token_id = owned.first_token_id
        and ends.last_id >= owned.token_id
),
spans as materialized (
    select
        last_id                         as token_id,
        last_id - min(latest.token_id)  as span,
        list(latest.token_id order by place) as token_ids,
        list(value order by place)      as feature_values
    from latest
    where last_id - latest.token_id <= "window"
    group by last_id
    having count(*) = coalesce(len(features), 0)
),
pieces as materialized (
    from token_pieces((select list(token_id) from spans))
)
select
    token_id,
    spans.span,
    spans.token_ids,
    spans.feature_values,
    pieces.piece,
    owners.key,
    owners.source,
    owners.position
from spans
join owners using (token_id)
join pieces using (token_id)
order by token_id;
