-- What the run was judged by: every measure of its evaluation, with its meaning.
--
-- Grain:   one row per measure; none until the run is evaluated.
-- Reads:   stg_runs
-- Units:   shares are from 0 to 1, losses in nats per token. value is null if the evaluation could not measure it.
-- Ask it:  how much of the model's loss does the autoencoder recover?
create or replace view metrics as
with meanings (place, metric, meaning) as (
    values
    (1, 'l0', 'Features that fire on a token, on average.'),
    (2, 'variance_unexplained', 'Share of the variance of the activations that the reconstruction misses.'),
    (3, 'variance_unexplained_without_longest', 'The same share without the longest 0.1% of the activations.'),
    (4, 'longest_share', 'Share of all squared lengths that the longest 0.1% of the activations hold.'),
    (5, 'mean_squared_error', 'Mean squared error of the reconstruction, per dimension.'),
    (6, 'shrinkage', 'Length of the reconstruction relative to the activation; 1 is best.'),
    (7, 'loss_recovered_zero',
        'Share of the loss recovered: 1 if the model predicts as well with the reconstruction as with the activations, '
        || '0 if as badly as with zeros in their place.'),
    (8, 'loss_recovered_mean', 'The same share, with the mean activation in the place of zeros.'),
    (9, 'loss', 'Loss of the model on the next token, unchanged.'),
    (10, 'loss_sae', 'Loss with the reconstruction in place of the activations.'),
    (11, 'loss_zero_ablated', 'Loss with zeros in place of the activations.'),
    (12, 'loss_mean_ablated', 'Loss with the mean activation in place of the activations.'),
    (13, 'kl_recovered_zero', 'Share recovered of the divergence from the predictions of the unchanged model (zeros).'),
    (14, 'kl_recovered_mean', 'Share recovered of that divergence (mean activation).'),
    (15, 'kl_sae', 'Divergence of the predictions with the reconstruction from those of the unchanged model.'),
    (16, 'kl_zero_ablated', 'That divergence with zeros in place of the activations.'),
    (17, 'kl_mean_ablated', 'That divergence with the mean activation in place of the activations.'),
    (18, 'dead_share', 'Share of the features that never fire on the encoded tokens.'),
    (19, 'n_dead', 'Features that never fire on the encoded tokens.'),
    (20, 'silent', 'Features that do not fire on the tokens judged.'),
    (21, 'dense_share', 'Share of the features that fire on more than a tenth of the tokens.'),
    (22, 'n_tokens', 'Tokens judged.'),
    (23, 'n_predicted', 'Tokens whose prediction was judged.'),
    (24, 'n_values', 'Values that the run stores.')
),
found as (
    select unnest(json_keys(quality)) as metric, quality from stg_runs where is_current
)
select
    metric,
    try_cast(quality ->> metric as double) as value,
    meaning
from found
join meanings using (metric)
order by place;
